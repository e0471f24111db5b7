"""The main job in a minute: a Blend backdoor in a small network on 5,000 real digits, then FT and AFT.

    python -m aft_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from aft_jax.config import default_config


def get_config():
    config = default_config()
    config.dataset = 'mnist5k'
    config.model.mean = (0.1307,)
    config.model.std = (0.3081,)
    config.attack.name = 'blend'
    return config
