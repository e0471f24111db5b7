"""A model that you do not trust: scan it, purify it and export it, with clean images alone and no trigger known.

    python -m aft_jax.main --config=configs/purify.py --workdir=out --config.init_from=suspect.pt
        --config.dataset=folder:/my/images [--config.model.mean="(0.5,)" --config.model.std="(0.5,)"]

init_from is a .pt, .pth or .safetensors file, or the work directory of a finished run; docs/own-model.md walks through
it. The data set is 100 clean, labelled images or more, of which data.test_share (a fifth) only measures. The network is
told from the file; --config.model.name=preact_resnet18 makes sure that it is the one you expect.

Pixels in [0, 1] are what the network sees unless model.mean and model.std say otherwise. A choice under which the model
guesses is an error, and one that is clearly worse than another usual one a warning.

A few hundred images take seconds to minutes (on the CPU, for small networks). For some thousand and more add
--config.aft.preset=default --config.batch_size=128, which passes over them less often.
"""

from aft_jax.config import default_config


def get_config():
    config = default_config()
    config.stages = ('scan', 'purify', 'report')
    config.dataset = ''
    config.attack.name = 'none'
    config.model.name = ''
    config.model.mean = (0.0,)
    config.model.std = (1.0,)
    config.clean_share = 1.0
    config.defenses = 'aft'
    config.aft.preset = 'small'
    config.ft.epochs = 200
    config.batch_size = 64
    config.run.purify_points = 10
    return config
