"""Placeholders for objects in a pickle that are neither tensors nor plain values.

Training scripts store their arguments, paths and dates beside the weights, and BackdoorBench stores NumPy arrays and
pictures. None of their classes is imported and none of their code runs: a placeholder ignores all arguments. Only the
bytes of NumPy arrays are kept, because some files have arrays in place of tensors.
"""

import math
from typing import Any

import numpy as np

LEFT_OUT = (
    'numpy.core.multiarray.scalar',
    'numpy._core.multiarray.scalar',
    'numpy.ndarray',
    'argparse.Namespace',
    'types.SimpleNamespace',
    'pathlib.PosixPath',
    'pathlib.WindowsPath',
    'pathlib.PurePosixPath',
    'pathlib._local.PosixPath',
    'pathlib._local.WindowsPath',
    'datetime.date',
    'datetime.datetime',
    'datetime.timedelta',
    'uuid.UUID',
    'PIL.Image.Image',
    'PIL.PngImagePlugin.PngImageFile',
    'PIL.JpegImagePlugin.JpegImageFile',
)
RECONSTRUCT = 'numpy.core.multiarray._reconstruct', 'numpy._core.multiarray._reconstruct'
# Types of weights and counters, little-endian: kind and bytes.
DTYPES = ('f2', 'f4', 'f8', 'i4', 'i8')
# Number of values in the state of an array.
STATE_LENGTH = 5


class LeftOut:
    """A placeholder for any object in a file."""

    def __init__(self, *arguments: Any):
        """Ignores all arguments."""

    def __setstate__(self, state: Any) -> None:
        """Ignores the state."""


class StoredType(LeftOut):
    """A placeholder for numpy.dtype, which keeps the name of the type."""

    def __init__(self, name: Any = '', *arguments: Any):
        """Keeps the name, such as 'f4'."""
        self.name = name
        self.big_endian = False

    def __setstate__(self, state: Any) -> None:
        """Keeps the order of the bytes."""
        self.big_endian = not (isinstance(state, tuple) and len(state) > 1 and state[1] in ('<', '|', '='))


class StoredArray(LeftOut):
    """A placeholder for a NumPy array, which keeps its state: version, shape, type, order and bytes."""

    def __init__(self, *arguments: Any):
        """Creates an array without a state."""
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        """Keeps the state."""
        self.state = state

    def array(self) -> np.ndarray | None:
        """Builds the array from its bytes; None if it is not one of plain numbers."""
        if not isinstance(self.state, tuple) or len(self.state) != STATE_LENGTH:
            return None
        _, shape, kind, fortran, content = self.state
        plain = isinstance(kind, StoredType) and kind.name in DTYPES and not kind.big_endian
        if not plain or not isinstance(content, bytes) or not isinstance(shape, tuple):
            return None
        if not all(isinstance(length, int) and length >= 0 for length in shape):
            return None
        dtype = np.dtype(f'<{kind.name}')
        if math.prod(shape) * dtype.itemsize != len(content):
            return None
        return np.frombuffer(content, dtype).reshape(shape, order='F' if fortran else 'C')


def placeholders() -> list[Any]:
    """Lists the placeholders with the names that they stand for, as torch's restricted loader takes them."""
    return [
        *((LeftOut, name) for name in LEFT_OUT),
        *((StoredArray, name) for name in RECONSTRUCT),
        (StoredType, 'numpy.dtype'),
    ]
