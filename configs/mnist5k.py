"""5,000 real MNIST digits from a Python package: small enough to try any attack or defense on a laptop.

    python -m aft_jax.main --config=configs/mnist5k.py:sig --workdir=runs/mnist5k-sig

The name after the colon is the attack.
"""

from aft_jax.config import default_config


def get_config(attack='badnets'):
    config = default_config()
    config.attack.name = attack
    config.dataset = 'mnist5k'
    config.augment.crop = 2
    config.model.name = 'mnist_cnn'
    config.model.mean = (0.1307,)
    config.model.std = (0.3081,)
    config.train.epochs = 20
    # 5 % of 4,000 images are 200. An epoch has one or two steps, so a defense needs more epochs.
    config.ft.epochs = 200
    config.ft.learning_rates = (0.01,)
    # Digits need fewer steps than clothes.
    config.aft.reference_steps = config.aft.steps = 200
    config.aft_universal.preset = 'small'
    return config
