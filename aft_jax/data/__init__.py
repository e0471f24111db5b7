"""From a data set's name to its arrays in memory.

A picture passes through four steps, always in this order: decode, resize, pad, repeat grey to three channels. So
`size=28, pad=2, rgb=True` makes every picture 32x32x3, with two pixels of zero around what it shows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from aft_jax.data import fashion_mnist, folder, mnist5k, npz, tfds_source, transform
from aft_jax.data.dataset import Dataset
from aft_jax.errors import UserError, nearest

__all__ = ['BUILTIN', 'Dataset', 'check_name', 'load']

_tfds = functools.partial(functools.partial, tfds_source.load)

BUILTIN: dict[str, Callable[[Any], Dataset]] = {
    'mnist5k': mnist5k.load,
    'fashion_mnist': fashion_mnist.load,
    'mnist': _tfds('mnist'),
    'cifar10': _tfds('cifar10'),
    'cifar100': _tfds('cifar100'),
    'svhn_cropped': _tfds('svhn_cropped'),
    # The Decathlon keeps the labels of its test split to itself (they are all -1), and its pictures vary in size.
    'gtsrb': _tfds('visual_domain_decathlon/gtsrb', test_split='validation', default_size=32),
    # 1.28 million pictures: about 16 GB of memory, and two minutes to decode.
    'imagenet64': _tfds('imagenet_resized/64x64', test_split='validation'),
}

_FROM_PATH: dict[str, Callable[[str, Any], Dataset]] = {'npz': npz.load, 'folder': folder.load}


def check_name(name: str) -> None:
    """Checks that a data set of this name can be asked for, without touching any data.

    Args:
        name: One of `BUILTIN`, 'npz:PATH' or 'folder:PATH'.

    Raises:
        UserError: If there is no such data set. It lists those that exist, and the nearest name where one is near.
    """
    kind, colon, path = name.partition(':')
    if name in BUILTIN or (kind in _FROM_PATH and path):
        return
    forms = [f'{form}:PATH' for form in _FROM_PATH]
    if kind in _FROM_PATH:
        raise UserError(f"Data set '{name}' lacks its path: write {kind}:PATH.")
    near = nearest(name.lower(), BUILTIN)
    if not near and colon and (form := nearest(kind.lower(), _FROM_PATH)):
        near = f'{form}:{path}'
    hint = f" Did you mean '{near}'?" if near else ''
    raise UserError(f"There is no data set '{name}': choose one of {', '.join([*BUILTIN, *forms])}.{hint}")


def load(name: str, options: Any) -> Dataset:
    """Loads a data set into memory, preparing it on disk first if this is the first time.

    Args:
        name: One of `BUILTIN`, 'npz:PATH' or 'folder:PATH'.
        options: Has the attributes
            dir: The TFDS data directory; '' is TFDS's default ($TFDS_DATA_DIR, or ~/tensorflow_datasets).
            idx_dir: Folder of the four Fashion-MNIST .gz files; '' is Debian's, where it exists.
            size: Every picture is resized to size x size (bilinear, antialiased); 0 leaves it as it is (gtsrb: 32).
            pad: Pixels of zero that are added on every side, after resizing.
            rgb: Whether grey pictures are repeated to three channels; nothing happens to coloured ones.
            test_share: The share of each class held out as test images, for a folder that has no split of its own.

    Returns:
        The data set; images are uint8 [N, H, W, C], labels int32 [N].

    Raises:
        UserError: If the name is unknown, or the data are missing, damaged or cannot be prepared.
    """
    check_name(name)
    kind, _, path = name.partition(':')
    dataset = BUILTIN[name](options) if name in BUILTIN else _FROM_PATH[kind](path, options)
    return dataclasses.replace(
        dataset,
        name=name,
        train_images=transform.pad_and_repeat(dataset.train_images, options.pad, options.rgb),
        test_images=transform.pad_and_repeat(dataset.test_images, options.pad, options.rgb),
    )
