"""German traffic signs (43 classes) at 32x32 and PreActResNet18.

    python -m aft_jax.main --config=configs/gtsrb.py:badnets --workdir=runs/gtsrb

TFDS has GTSRB as visual_domain_decathlon/gtsrb, whose test split has no labels. The test set here is its validation
split, so results cannot be compared with those on the official test set. Images are not flipped, because the mirror
image of a sign is another sign.

It needs an accelerator. The first start downloads the data set, and needs TensorFlow to prepare it. We have not run it
on the real data set yet.
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
