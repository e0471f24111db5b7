"""Loads a data set by its name into arrays in memory.

Every picture is decoded, resized, padded and, if it is grey, repeated to three channels, in this order. So
`size=28, pad=2, rgb=True` makes every picture 32x32x3, with a border of two black pixels.
"""

import dataclasses
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aft_jax.data import fashion_mnist, folder, mnist5k, npz, tfds_source, transform
from aft_jax.data.dataset import Dataset
from aft_jax.errors import UserError, nearest

__all__ = ['BUILTIN', 'Dataset', 'check_name', 'load']

BUILTIN: dict[str, Callable[[Any], Dataset]] = {
    'mnist5k': mnist5k.load,
    'fashion_mnist': fashion_mnist.load,
    'mnist': partial(tfds_source.load, 'mnist'),
    'cifar10': partial(tfds_source.load, 'cifar10'),
    'cifar100': partial(tfds_source.load, 'cifar100'),
    'svhn_cropped': partial(tfds_source.load, 'svhn_cropped'),
    # The Decathlon does not publish the labels of its test split (they are all -1), and its pictures vary in size.
    'gtsrb': partial(tfds_source.load, 'visual_domain_decathlon/gtsrb', test_split='validation', default_size=32),
    # 1.28 million pictures: about 16 GB of memory, and two minutes to decode.
    'imagenet64': partial(tfds_source.load, 'imagenet_resized/64x64', test_split='validation'),
}

log = logging.getLogger(__name__)
# How many times the images of the smallest class the largest one may have without a warning.
UNEVEN = 20
_FROM_PATH: dict[str, Callable[[str, Any], Dataset]] = {'npz': npz.load, 'folder': folder.load}


def check_name(name: str) -> None:
    """Checks the name of a data set, without touching any data.

    Args:
        name: One of `BUILTIN`, 'npz:PATH' or 'folder:PATH'.

    Raises:
        UserError: If there is no such data set. The message lists all names, and the nearest one if there is.
    """
    kind, colon, path = name.partition(':')
    if name in BUILTIN or (kind in _FROM_PATH and path):
        return
    forms = [f'{form}:PATH' for form in _FROM_PATH]
    if kind in _FROM_PATH:
        raise UserError(f"Data set '{name}' lacks its path: write {kind}:PATH.")
    if hint := _path_form(name):
        raise UserError(f"There is no data set '{name}'; did you mean {hint}?")
    near = nearest(name.lower(), BUILTIN)
    if not near and colon and (form := nearest(kind.lower(), _FROM_PATH)):
        near = f'{form}:{path}'
    hint = f" Did you mean '{near}'?" if near else ''
    raise UserError(f"There is no data set '{name}': choose one of {', '.join([*BUILTIN, *forms])}.{hint}")


def _path_form(name: str) -> str:
    """Returns the form of a path that lacks its kind, such as folder:/data/mine; '' if it is none."""
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        return f'folder:{name}'
    return f'npz:{name}' if path.suffix == '.npz' and ':' not in name else ''


def load(name: str, options: Any) -> Dataset:
    """Loads a data set into memory, preparing it on disk the first time.

    Args:
        name: One of `BUILTIN`, 'npz:PATH' or 'folder:PATH'.
        options: An object with the attributes
            dir: TFDS data directory; '' is TFDS's default ($TFDS_DATA_DIR, or ~/tensorflow_datasets).
            idx_dir: Folder of the four Fashion-MNIST .gz files; '' is Debian's, where it exists.
            size: Side of the resized pictures (bilinear, antialiased); 0 keeps their size (gtsrb: 32).
            pad: Pixels of zero added on every side, after resizing.
            rgb: Whether grey pictures are repeated to three channels; coloured ones stay as they are.
            bgr: Whether the order of the channels is reversed.
            classes: Order of the classes of a folder, see `class_order`.
            test_share: Share of each class held out as test images, for a folder without train/ and test/.

    Returns:
        The data set; images are uint8 [N, H, W, C], labels int32 [N].

    Raises:
        UserError: If the name is unknown, or the data are missing, damaged, or cannot be prepared.
    """
    check_name(name)
    kind, _, path = name.partition(':')
    dataset = BUILTIN[name](options) if name in BUILTIN else _FROM_PATH[kind](path, options)
    _warn_if_uneven(dataset)
    return dataclasses.replace(
        dataset,
        name=name,
        train_images=_finished(dataset.train_images, options),
        test_images=_finished(dataset.test_images, options),
    )


def _finished(images: np.ndarray, options: Any) -> np.ndarray:
    images = transform.pad_and_repeat(images, options.pad, options.rgb)
    return np.ascontiguousarray(images[..., ::-1]) if options.bgr else images


def _warn_if_uneven(dataset: Dataset) -> None:
    """Logs a warning if one class has many times the training images of another one."""
    counts = np.bincount(dataset.train_labels, minlength=dataset.num_classes)
    most, fewest = int(counts.argmax()), int(np.where(counts > 0, counts, counts.max()).argmin())
    if counts[most] > UNEVEN * counts[fewest]:
        name = dataset.class_names
        log.warning(
            'The classes differ much in their training images: %s has %d, %s has %d.',
            *(name[most], counts[most], name[fewest], counts[fewest]),
        )
