"""A data set of the user's own, as a folder of pictures: one sub-folder per class."""

import collections
import logging
import pathlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from aft_jax.data import split, transform
from aft_jax.data.class_order import class_order
from aft_jax.data.dataset import Dataset
from aft_jax.errors import UserError, user_path

log = logging.getLogger(__name__)
SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')


def load(path: str, options: Any) -> Dataset:
    """Loads a folder of pictures.

    The names of the sub-folders, sorted, are the classes, unless `options.classes` gives another order. PATH/train and
    PATH/test, each with the same classes, are the splits where they exist. Otherwise `options.test_share` of every
    class is held out, the same pictures in every run.

    If all pictures are grey the images have one channel, otherwise three. Transparency is dropped. Only the first frame
    of an animation is used.

    Args:
        path: The folder.
        options: Options of `aft_jax.data.load`.

    Returns:
        The data set; the pictures of each class are in the order of their names.

    Raises:
        UserError: If the folder has another layout, a picture is broken, or the pictures differ in size and
            `options.size` is 0.
    """
    root = user_path(path, 'dataset=folder:')
    if not root.is_dir():
        raise UserError(f'There is no folder {root}: give a folder with one sub-folder of pictures per class.')
    halves = [half for half in ('train', 'test') if (root / half).is_dir()]
    if halves == ['train', 'test']:
        train, test = (_find_pictures(root / half) for half in halves)
        _check_same_classes(root, train, test)
        held_out = None
    elif halves:
        missing = 'test' if halves == ['train'] else 'train'
        raise UserError(f'{root} has a folder {halves[0]}, but none named {missing}: give both, or neither.')
    else:
        train, test = _find_pictures(root), {}
        held_out = options.test_share

    class_names = class_order(list(train), options.classes)
    if empty := [name for name in class_names if name not in train]:
        log.warning('%s has no pictures of %d classes: %s.', root, len(empty), ', '.join(empty[:5]))
    paths = [*_flatten(train), *_flatten(test)]
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    labels = np.array([label_of[picture.parent.name] for picture in paths], np.int32)
    if held_out is None:
        count = len(_flatten(train))
        train_at, test_at = np.arange(count), np.arange(count, len(paths))
    else:
        _check_splittable(train)
        train_at, test_at = split.stratified(labels, held_out)

    images = _drop_grey_channels(transform.stack(_read_all(paths), len(paths), options.size, f'folder {root}'))
    return Dataset(
        name=f'folder:{path}',
        train_images=images[train_at],
        train_labels=labels[train_at],
        test_images=images[test_at],
        test_labels=labels[test_at],
        class_names=class_names,
    )


def _find_pictures(root: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Lists the pictures of each class, both sorted."""
    classes = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith('.'))
    if len(classes) < 2:
        present = f'only one, {classes[0].name}' if classes else 'none'
        raise UserError(f'{root} needs at least two sub-folders, one for each class; it has {present}.')
    pictures, others = {}, collections.Counter[str]()
    for folder in classes:
        files = [entry for entry in folder.iterdir() if not entry.name.startswith('.') and entry.is_file()]
        pictures[folder.name] = sorted(entry for entry in files if entry.suffix.lower() in SUFFIXES)
        others.update(entry.suffix or entry.name for entry in files if entry.suffix.lower() not in SUFFIXES)
        if not pictures[folder.name]:
            raise UserError(f'The class folder {folder} has no picture ({" ".join(SUFFIXES)}): add some, or remove it.')
    if others:
        kinds = ', '.join(f'{count} {suffix}' for suffix, count in sorted(others.items()))
        log.warning(
            '%s: files that are no pictures (%s) are left out; pictures are %s.', root, kinds, ' '.join(SUFFIXES)
        )
    return pictures


def _check_same_classes(root: pathlib.Path, train: dict[str, Any], test: dict[str, Any]) -> None:
    odd = sorted(set(train) ^ set(test))
    if odd:
        where = 'train' if odd[0] in train else 'test'
        raise UserError(f'{root}/train and {root}/test must have the same classes: {odd[0]} is in {where} alone.')


def _check_splittable(pictures: dict[str, list[pathlib.Path]]) -> None:
    for name, paths in pictures.items():
        if len(paths) < 2:
            raise UserError(
                f'The class folder {paths[0].parent} has one picture only, too few to hold one out for the test: '
                f'add more, remove {name}, or give folders train and test.'
            )


def _flatten(pictures: dict[str, list[pathlib.Path]]) -> list[pathlib.Path]:
    return [path for paths in pictures.values() for path in paths]


def _read_all(paths: list[pathlib.Path]) -> Iterator[np.ndarray]:
    for path in paths:
        yield read_picture(path)


def read_picture(path: pathlib.Path) -> np.ndarray:
    """Reads a picture.

    Args:
        path: Picture file in one of the formats of `SUFFIXES`.

    Returns:
        uint8 [H, W, 3]; a grey picture has three equal channels.

    Raises:
        UserError: If the picture is broken, larger than PIL considers safe, or has more than eight bits per channel.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                if picture.mode.startswith(('I', 'F')):
                    raise UserError(f'The picture {path} has more than eight bits per channel: convert it to eight.')
                # Cameras store how they were held in the EXIF orientation.
                return np.asarray(ImageOps.exif_transpose(picture).convert('RGB'))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f'The picture {path} is too large to be read safely: make it smaller ({error}).') from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        reason = str(error).replace('\n', ' ')
        raise UserError(f'The picture {path} cannot be read ({reason}): repair or remove it.') from error


def _drop_grey_channels(images: np.ndarray) -> np.ndarray:
    grey = all((image[..., :1] == image[..., 1:]).all() for image in images)
    return images[..., :1] if grey else images
