"""Scans, purifies and exports a model that you do not trust, with clean images and without knowing a trigger.

    python -m aft_jax.main --config=configs/purify.py --workdir=out --config.init_from=suspect.pt
        --config.dataset=folder:/my/images [--config.model.mean="(0.5,)" --config.model.std="(0.5,)"]

init_from is a .pt, .pth or .safetensors file, or the work directory of a finished run; docs/own-model.md explains
every step. The data set needs at least 100 clean, labelled images. A share of them, data.test_share (a fifth), is used
for the evaluation alone. The network is recognised from the file. To check that it is the one you expect, add for
example --config.model.name=preact_resnet18.

The network sees pixels in [0, 1] unless model.mean and model.std define a normalisation. A normalisation with which
the model is no better than chance is an error. One that is clearly worse than another common one is a warning.

The last line of the output is a verdict: whether a search for triggers finds a change that leads to one label.

The defense is AFT, whose lengths are in steps: it takes as long with thousands of images as with a few hundred. FT, if
you add it, has 200 epochs, which suit a few hundred images. For thousands set --config.ft.epochs=40.
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
    config.aft_universal.preset = 'small'
    config.ft.epochs = 200
    config.batch_size = 64
    config.run.purify_points = 10
    return config
