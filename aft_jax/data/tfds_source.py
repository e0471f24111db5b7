"""Data sets of TFDS: prepared once as ArrayRecord, then read without TensorFlow."""

import contextlib
import fcntl
import importlib.util
import io
import os
import pathlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from aft_jax.data import transform
from aft_jax.data.dataset import Dataset
from aft_jax.data.tfds_quiet import fail_fast, quiet, removes_temporary_files
from aft_jax.errors import UserError

_CHUNK = 4096  # records fetched at once: one by one is four times slower, all at once doubles the memory


def load(tfds_name: str, options: Any, *, test_split: str = 'test', default_size: int = 0) -> Dataset:
    """Loads an image classification set of TFDS's catalogue, downloading and preparing it the first time.

    Args:
        tfds_name: Name in TFDS's catalogue, with its config if there is one, such as 'imagenet_resized/64x64'.
        options: Options of `aft_jax.data.load`.
        test_split: Split that serves as the test images.
        default_size: Size of the pictures where `options.size` is 0.

    Returns:
        The data set.

    Raises:
        UserError: If the data set cannot be prepared (no network, no TensorFlow, no disk space), or if the prepared
            files cannot be read.
    """
    require_tfds(tfds_name)
    import tensorflow_datasets as tfds

    def check() -> None:
        for package in ('tensorflow', 'importlib_resources'):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"Data set '{tfds_name}' is not prepared in {data_dir(options)}, and preparing it needs the "
                    f'package {package}: pip install aft_jax[prepare], or set --config.data.dir to a directory that '
                    'holds it already.'
                )

    return load_own(
        tfds_name, lambda **kwargs: tfds.builder(tfds_name, **kwargs), check, options, test_split, default_size
    )


def load_own(
    name: str,
    make_builder: Callable[..., Any],
    check: Callable[[], Any],
    options: Any,
    test_split: str = 'test',
    default_size: int = 0,
) -> Dataset:
    """Loads the data set of a TFDS builder, preparing it the first time.

    Args:
        name: Name of the data set in messages.
        make_builder: Function that makes the TFDS builder from `data_dir` and `file_format`.
        check: Function called before preparing, which raises UserError if preparing cannot succeed.
        options: Options of `aft_jax.data.load`.
        test_split: Split that serves as the test images.
        default_size: Size of the pictures where `options.size` is 0.

    Returns:
        The data set; its examples are in the order of TFDS.

    Raises:
        UserError: If the data set cannot be prepared or read; see `load`.
    """
    root = data_dir(options)
    with quiet(), removes_temporary_files():
        builder = _open_builder(name, make_builder, root)
        if not builder.is_prepared():
            check()
            with _only_one(root, name):
                # Another process may have prepared it while this one waited for the lock.
                builder = _open_builder(name, make_builder, root)
                if not builder.is_prepared():
                    _prepare(name, builder, root)
        size = options.size or default_size
        try:
            train_images, train_labels = _read(builder, 'train', size, name)
            test_images, test_labels = _read(builder, test_split, size, name)
        except UserError:
            raise
        except Exception as error:  # TFDS, ArrayRecord, protobuf and PIL raise errors of their own
            raise UserError(
                f"Data set '{name}' in {builder.data_path} is damaged ({_reason(error)}): "
                'delete that directory, and the data set is prepared again.'
            ) from error
        names = tuple(str(class_name) for class_name in builder.info.features['label'].names)
    return Dataset(name, train_images, train_labels, test_images, test_labels, names)


def require_tfds(name: str) -> None:
    """Checks that TensorFlow Datasets is installed; raises a UserError about the data set `name` if it is not."""
    if importlib.util.find_spec('tensorflow_datasets') is None:
        raise UserError(
            f"Data set '{name}' is read with TensorFlow Datasets, which is not installed: "
            'pip install tensorflow-datasets, or give the data as npz:PATH or folder:PATH.'
        )


def data_dir(options: Any) -> str:
    """Returns the TFDS data directory: `options.dir`, or else TFDS's default."""
    if options.dir:
        return os.path.expanduser(options.dir)
    from tensorflow_datasets.core import constants

    return os.path.expanduser(constants.DATA_DIR)


def _open_builder(name: str, make_builder: Callable[..., Any], root: str) -> Any:
    try:
        return make_builder(data_dir=root, file_format='array_record')
    except Exception as error:
        if 'File format is already set' in str(error):
            raise UserError(
                f"Data set '{name}' is prepared in {root}, but not as ArrayRecord: set --config.data.dir to another "
                'directory, or convert it with `tfds convert_format`.'
            ) from error
        raise UserError(f"Data set '{name}' in {root} cannot be opened: {_reason(error)}.") from error


@contextlib.contextmanager
def _only_one(root: str, name: str) -> Iterator[None]:
    """Holds a lock while a data set is prepared; the system frees the lock if this process dies."""
    if '://' in root:  # a bucket has no locks; TFDS's rename at the end decides which process was first
        yield
        return
    try:
        pathlib.Path(root).mkdir(parents=True, exist_ok=True)
        lock = open(pathlib.Path(root, f'.{name.replace("/", "-")}.lock'), 'w')  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"Data set '{name}' cannot be prepared in {root} ({error.strerror}): "
            'set --config.data.dir to a writable directory.'
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _prepare(name: str, builder: Any, root: str) -> None:
    from tensorflow_datasets.core.download import DownloadConfig

    print(f"Preparing data set '{name}' in {root}, this once.", file=sys.stderr, flush=True)
    try:
        with fail_fast():
            # The copies in TFDS's bucket are TFRecord, and looking for them hangs without a network.
            builder.download_and_prepare(download_config=DownloadConfig(try_download_gcs=False))
    except Exception as error:  # downloads raise errors of many kinds
        raise UserError(
            f"Data set '{name}' is not prepared in {root} and could not be downloaded or prepared there "
            f'({_reason(error)}): try again with a network, or set --config.data.dir to a directory that holds it.'
        ) from error


def _reason(error: Exception) -> str:
    return textwrap.shorten(f'{type(error).__name__}: {error}', 120, placeholder=' ...')


def _read(builder: Any, split: str, size: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads a split: uint8 [N, H, W, C] and int32 [N]."""
    import tensorflow_datasets as tfds
    from PIL import Image

    # PIL decodes here, not TFDS: PIL is twice as fast, and does not depend on whether OpenCV is installed.
    source = builder.as_data_source(split, decoders={'image': tfds.decode.SkipDecoding()})
    channels = builder.info.features['image'].shape[-1]
    labels = np.empty(len(source), np.int32)

    def decode() -> Iterator[np.ndarray]:
        for start in range(0, len(source), _CHUNK):
            indices = range(start, min(start + _CHUNK, len(source)))
            for index, record in zip(indices, source.__getitems__(list(indices)), strict=True):
                labels[index] = record['label']
                with Image.open(io.BytesIO(record['image'])) as picture:
                    yield np.asarray(picture.convert('L' if channels == 1 else 'RGB')).reshape(
                        picture.height, picture.width, channels
                    )

    images = transform.stack(decode(), len(source), size, f"data set '{name}'")
    if not 0 <= labels.min() <= labels.max() < builder.info.features['label'].num_classes:
        raise ValueError(f'labels of the split {split} are out of range')
    return images, labels
