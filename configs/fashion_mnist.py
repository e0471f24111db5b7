"""All of Fashion-MNIST (60,000 training and 10,000 test images of clothes) and the small network.

    python -m aft_jax.main --config=configs/fashion_mnist.py:sig --workdir=runs/fashion-sig

The name after the colon is the attack: badnets, blend, sig, wanet, input_aware or none. WaNet and input-aware control
the training, as in their papers, and need more epochs than the others. none_long is a benign model trained as long
as WaNet's.

The images come from TFDS, from Debian's package dataset-fashion-mnist, or from the folder of four IDX files that
--config.data.idx_dir names.
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
    # The mask network has converged after half an epoch.
    config.attack.input_aware.mask_epochs = 0.5
    return config
