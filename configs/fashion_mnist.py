"""All of Fashion-MNIST (60,000 + 10,000 images of clothes) and the small network.

    python -m aft_jax.main --config=configs/fashion_mnist.py:sig --workdir=runs/fashion-sig

The name after the colon is the attack: badnets, blend, sig, wanet, input_aware or none. WaNet and input-aware take more
training than the others, and control it, as their authors have it; none_long is the benign model trained as long as
WaNet's.

The images come from TFDS, or from the four IDX files where a system has them: Debian's package
dataset-fashion-mnist, or a folder named by --config.data.idx_dir.
"""

from aft_jax.config import default_config

ATTACKS = ('badnets', 'blend', 'sig', 'wanet', 'input_aware', 'none', 'none_long')
EPOCHS = {'wanet': 20, 'input_aware': 30, 'none_long': 20}


def get_config(attack='badnets'):
    config = default_config()
    config.attack.name = attack.removesuffix('_long')
    config.dataset = 'fashion_mnist'
    config.augment.flip = True
    config.model.name = 'mnist_cnn'
    config.model.mean = (0.2860,)
    config.model.std = (0.3530,)
    config.train.epochs = EPOCHS.get(attack, 10)
    config.train.learning_rate = 0.05
    config.run.checkpoint_every = 1000
    if attack == 'wanet':
        config.attack.poisoning = 'per_batch'
    # The mask network has settled after half an epoch.
    config.attack.input_aware.mask_epochs = 0.5
    return config
