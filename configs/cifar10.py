"""CIFAR-10 and PreActResNet18 as in the paper: 100 epochs, batch 128, SGD 0.01 with cosine decay.

    python -m aft_jax.main --config=configs/cifar10.py:blend --workdir=runs/cifar10-blend

The name after the colon is the attack: badnets, blend, sig, wanet, input_aware or none.

It needs an accelerator. The first start downloads the data set, and needs TensorFlow to prepare it:
pip install 'aft_jax[prepare]'. We have not run it on real CIFAR-10 yet.
"""

from aft_jax.config import default_config

ATTACKS = ('badnets', 'blend', 'sig', 'wanet', 'input_aware', 'none')


def get_config(attack='badnets'):
    config = default_config()
    config.attack.name = attack
    config.dataset = 'cifar10'
    config.augment.crop = 4
    config.augment.flip = True
    config.model.name = 'preact_resnet'
    config.model.depth = 18
    config.model.width = 64
    config.model.mean = (0.4914, 0.4822, 0.4465)
    config.model.std = (0.2470, 0.2435, 0.2616)
    config.dtype = 'bfloat16'
    config.train.epochs = 100
    config.train.learning_rate = 0.01
    config.run.evaluate_every = 10.0
    return config
