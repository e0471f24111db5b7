"""All of Fashion-MNIST (60,000 + 10,000 images of clothes) and the small network.

    python -m aft_jax.main --config=configs/fashion_mnist.py:sig --workdir=runs/fashion-sig

The name after the colon is the attack: badnets, blend, sig, wanet, input_aware or none.

The images come from TFDS, or from the four IDX files where a system has them: Debian's package
dataset-fashion-mnist, or a folder named by --config.data.idx_dir.
"""

from aft_jax.config import default_config


def get_config(attack='badnets'):
    config = default_config()
    config.attack.name = attack
    config.dataset = 'fashion_mnist'
    config.augment.crop = 2
    config.augment.flip = True
    config.model.name = 'mnist_cnn'
    config.model.mean = (0.2860,)
    config.model.std = (0.3530,)
    config.train.epochs = 10
    config.train.learning_rate = 0.02
    config.run.checkpoint_every = 1000
    return config
