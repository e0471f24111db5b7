"""A data set of the user's own, as four arrays in one .npz file."""

import contextlib
import logging
import os
import zipfile
import zlib
from typing import Any

import numpy as np

from aft_jax.data import transform
from aft_jax.data.dataset import Dataset
from aft_jax.errors import UserError, user_path

log = logging.getLogger(__name__)
_ARRAYS = ('train_images', 'train_labels', 'test_images', 'test_labels')


def load(path: str, options: Any) -> Dataset:
    """Loads a .npz file.

    Args:
        path: The file. `train_images` and `test_images` are uint8 [N, H, W] or [N, H, W, C] with C in {1, 3}.
            `train_labels` and `test_labels` are integers [N] in [0, K). K is one more than the largest training label.
            `class_names`, strings, is optional. It may name more classes than have images.
        options: Options of `aft_jax.data.load`.

    Returns:
        The data set.

    Raises:
        UserError: If the file cannot be read, or one of its arrays is missing or of another kind.
    """
    path = str(user_path(path, 'dataset=npz:'))
    arrays = _read(path)
    train_images, test_images = (_check_images(path, name, arrays[name]) for name in ('train_images', 'test_images'))
    if train_images.shape[1:] != test_images.shape[1:]:
        raise UserError(
            f'{path}: test_images are {_by(test_images)}, but train_images are {_by(train_images)}; '
            'both must have the same height, width and channels.'
        )
    train_labels, test_labels = (_check_labels(path, name, arrays) for name in ('train_labels', 'test_labels'))
    classes = int(train_labels.max()) + 1
    if not 2 <= classes <= len(train_labels):
        raise UserError(
            f'{path}: the largest value of train_labels is {classes - 1}, among {len(train_labels)} labels; '
            'labels must number the classes 0, 1, 2, ..., and there must be at least two classes.'
        )
    names = arrays.get('class_names')
    if names is not None and names.ndim == 1:
        classes = max(classes, len(names))
    _check_gaps(path, train_labels, classes, names is not None)
    if test_labels.max() >= classes:
        raise UserError(
            f'{path}: test_labels has the value {test_labels.max()}, but train_labels goes up to {classes - 1} only; '
            'every class must occur in train_labels.'
        )
    return Dataset(
        name=f'npz:{path}',
        train_images=_resize(train_images, options.size, path),
        train_labels=train_labels.astype(np.int32),
        test_images=_resize(test_images, options.size, path),
        test_labels=test_labels.astype(np.int32),
        class_names=_class_names(path, names, classes),
    )


def _read(path: str) -> dict[str, np.ndarray]:
    if not os.path.isfile(path):
        raise UserError(f'There is no file {path}: give the path of an .npz file as npz:PATH.')
    with contextlib.ExitStack() as stack:
        try:
            # NumPy does not close a damaged file that it opened itself.
            stream = stack.enter_context(open(path, 'rb'))
            file = np.load(stream, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f'{path} is damaged or not an .npz file: write it with numpy.savez.') from error
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise UserError(f'{path} holds one single array, not several as an .npz file: write it with numpy.savez.')
        stack.enter_context(file)
        missing = [name for name in _ARRAYS if name not in file.files]
        if missing:
            present = ', '.join(file.files) or 'nothing'
            raise UserError(f'{path} lacks {", ".join(missing)}: it needs {", ".join(_ARRAYS)} and has {present}.')
        return {name: _read_array(path, file, name) for name in (*_ARRAYS, 'class_names') if name in file.files}


def _read_array(path: str, file: Any, name: str) -> np.ndarray:
    try:
        array = file[name]
    except ValueError as error:
        if 'allow_pickle' in str(error):
            raise UserError(
                f'{path}: {name} is an array of Python objects, which could run code when it is read; '
                'save it with a plain dtype.'
            ) from error
        raise UserError(f'{path}: {name} is damaged ({error}); write the file again.') from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f'{path}: {name} is damaged ({error}); write the file again.') from error
    if not isinstance(array, np.ndarray):  # NumPy returns a member that is not an .npy file as bytes
        raise UserError(f'{path}: {name} is not a NumPy array; write the file with numpy.savez.')
    return array


def _check_images(path: str, name: str, images: np.ndarray) -> np.ndarray:
    if images.dtype != np.uint8:
        hint = 'scale them to 0..255 and store' if images.dtype.kind == 'f' else 'store'
        raise UserError(f'{path}: {name} has dtype {images.dtype}; {hint} uint8.')
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise UserError(f'{path}: {name} has shape {images.shape}; it must be [N, H, W] or [N, H, W, C] with C 1 or 3.')
    if 0 in images.shape:
        raise UserError(f'{path}: {name} is empty (shape {images.shape}); it must have at least one image.')
    return images


def _check_labels(path: str, name: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    labels = arrays[name]
    images = name.replace('labels', 'images')
    if labels.dtype.kind not in 'iu':
        raise UserError(f'{path}: {name} has dtype {labels.dtype}; labels must be integers.')
    if labels.ndim != 1:
        raise UserError(f'{path}: {name} has shape {labels.shape}; it must be [N], one label for each image.')
    if len(labels) != len(arrays[images]):
        raise UserError(f'{path}: {name} has {len(labels)} entries, but {images} has {len(arrays[images])}.')
    if labels.min() < 0:
        raise UserError(f'{path}: {name} has the negative value {labels.min()}; labels must count from 0.')
    return labels


def _check_gaps(path: str, labels: np.ndarray, classes: int, named: bool) -> None:
    """Checks that every class has training images, where the labels alone say how many classes there are."""
    empty = np.flatnonzero(np.bincount(labels.astype(np.int64), minlength=classes) == 0)
    if not len(empty):
        return
    listed = ', '.join(str(label) for label in empty[:5]) + (', ...' if len(empty) > 5 else '')
    message = f'{path}: no image of train_labels has the label {listed}, of {classes} classes'
    if named:
        log.warning('%s.', message)
        return
    advice = 'subtract the smallest label' if labels.min() > 0 else 'number the classes without gaps'
    raise UserError(f'{message}; {advice}, or store class_names, one for each class, if this is meant.')


def _class_names(path: str, names: np.ndarray | None, classes: int) -> tuple[str, ...]:
    if names is None:
        return tuple(str(label) for label in range(classes))
    if names.dtype.kind != 'U' or names.shape != (classes,):
        raise UserError(
            f'{path}: class_names has dtype {names.dtype} and shape {names.shape}; '
            f'it must be {classes} strings, one for each label in train_labels.'
        )
    return tuple(str(name) for name in names)


def _by(images: np.ndarray) -> str:
    return 'x'.join(str(length) for length in images.shape[1:])


def _resize(images: np.ndarray, size: int, path: str) -> np.ndarray:
    return transform.stack(images, len(images), size, path) if size else images
