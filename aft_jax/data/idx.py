"""Readers of the IDX files of MNIST and Fashion-MNIST: a magic number, the sizes of the axes, then the bytes."""

import gzip
import pathlib
import struct
import zlib

import numpy as np

from aft_jax.errors import UserError

FILES = {
    'train': ('train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz'),
    'test': ('t10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz'),
}
_UNSIGNED_BYTE = 8


def fingerprint(folder: str) -> str:
    """Computes eight hexadecimal digits that change when one of the four files does.

    Args:
        folder: Folder with the files of `FILES`.

    Raises:
        UserError: If one of the files cannot be read.
    """
    checksum = 0
    for names in FILES.values():
        for name in names:
            try:
                checksum = zlib.crc32(pathlib.Path(folder, name).read_bytes(), checksum)
            except OSError as error:
                raise UserError(
                    f"Fashion-MNIST's file {name} cannot be read in {folder} ({error.strerror}): "
                    'set --config.data.idx_dir to a folder that has the four .gz files.'
                ) from error
    return f'{checksum:08x}'


def read(path: pathlib.Path, rank: int) -> np.ndarray:
    """Reads one gzipped IDX file of unsigned bytes.

    Args:
        path: File to read.
        rank: Number of axes that the array should have.

    Returns:
        A uint8 array with `rank` axes.

    Raises:
        UserError: If the file is missing or damaged, or is not such an IDX file.
    """
    try:
        content = gzip.decompress(path.read_bytes())
        zeros, kind, axes = struct.unpack('>HBB', content[:4])
        shape = struct.unpack(f'>{rank}I', content[4 : 4 + 4 * rank])
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise UserError(f'{path} is damaged or not a gzipped IDX file ({error}): fetch it again.') from error
    if (zeros, kind, axes) != (0, _UNSIGNED_BYTE, rank):
        raise UserError(f'{path} is not an IDX file of unsigned bytes with {rank} axes: fetch it again.')
    values = np.frombuffer(content[4 + 4 * rank :], np.uint8)
    if values.size != np.prod(shape, dtype=np.int64):
        raise UserError(f'{path} is damaged: it holds {values.size} values instead of {shape}; fetch it again.')
    return values.reshape(shape)


def read_splits(folder: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads the four files.

    Args:
        folder: Folder with the files of `FILES`.

    Returns:
        'train' and 'test': images, uint8 [N, 28, 28, 1], and labels, uint8 [N] in [0, 10).

    Raises:
        UserError: If a file is missing or damaged, or images and labels do not belong together.
    """
    splits = {}
    for split, (images_name, labels_name) in FILES.items():
        images = read(pathlib.Path(folder, images_name), rank=3)
        labels = read(pathlib.Path(folder, labels_name), rank=1)
        if images.shape[1:] != (28, 28) or len(images) != len(labels) or len(labels) == 0 or labels.max() > 9:
            raise UserError(
                f'{images_name} and {labels_name} in {folder} do not belong together: expected 28x28 images and one '
                f'label of 0 to 9 for each, but the shapes are {images.shape} and {labels.shape}.'
            )
        splits[split] = images[..., None], labels
    return splits
