"""A narrow PreActResNet18 on Fashion-MNIST padded to 32x32x3: the paper's setting, small enough for a CPU.

    python -m aft_jax.main --config=configs/preact_resnet.py:blend --workdir=runs/preact-blend

The name after the colon is the attack: badnets, blend, sig, wanet, input_aware or none. The network has a quarter of
the usual width and is trained for one epoch. That takes about five minutes on one core.
"""

from aft_jax.config import default_config

ATTACKS = ('badnets', 'blend', 'sig', 'wanet', 'input_aware', 'none')


def get_config(attack='badnets'):
    config = default_config()
    config.attack.name = attack
    # With one epoch and fixed poisoning, each image would be seen either with its trigger or without.
    config.attack.poisoning = 'per_batch'
    config.attack.input_aware.mask_epochs = 0.25
    config.dataset = 'fashion_mnist'
    config.data.pad = 2
    config.data.rgb = True
    config.augment.flip = True
    config.model.name = 'preact_resnet'
    config.model.depth = 18
    config.model.width = 16
    config.model.mean = (0.2189,)
    config.model.std = (0.3318,)
    config.train.epochs = 1
    config.train.learning_rate = 0.05
    config.run.evaluate_every = 0.5
    return config
