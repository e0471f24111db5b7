"""German traffic signs (43 classes) at 32x32 and PreActResNet18; for an accelerator.

    python -m aft_jax.main --config=configs/gtsrb.py:badnets --workdir=runs/gtsrb

TFDS has GTSRB as visual_domain_decathlon/gtsrb, whose test split has no labels: its validation split is the test set
here, so figures are not those of the official test set. No flips: a sign's mirror image is another sign. Preparing it
takes TensorFlow and a network. Not run by us yet on the real set.
"""

from configs import cifar10


def get_config(attack='badnets'):
    config = cifar10.get_config(attack)
    config.dataset = 'gtsrb'
    config.data.size = 32
    config.augment.flip = False
    config.augment.rotation = 10.0
    config.model.mean = (0.5,)
    config.model.std = (0.25,)
    config.train.epochs = 50
    return config
