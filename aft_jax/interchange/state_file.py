"""Files of tensors: .safetensors, and PyTorch's .pt and .pth, from which only tensors and plain values are loaded."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aft_jax.errors import UserError
from aft_jax.files import write_bytes

TORCH_SUFFIXES = ('.pt', '.pth', '.tar')  # .tar stands for .pth.tar
SUFFIXES = (*TORCH_SUFFIXES, '.safetensors')


class StateFile(NamedTuple):
    """The content of a file.

    Attributes:
        path: Path of the file.
        tensors: State dict with the keys, the order and the dtypes of the file.
        wrapper: Key of the dictionary in the file that holds the state dict, or '' if the file is the state dict.
        notes: Strings and integers beside the state dict of a torch file (such as BackdoorBench's model_name), or the
            metadata of a .safetensors file.
    """

    path: Path
    tensors: dict[str, np.ndarray]
    wrapper: str = ''
    notes: dict[str, Any] = {}


def read(path: Path) -> StateFile:
    """Reads a state dict without running code from the file.

    Args:
        path: A .safetensors, .pt, .pth or .pth.tar file. A torch file holds a state dict, or a dictionary with a state
            dict under a key such as 'model', 'netC' or 'state_dict'.

    Raises:
        UserError: If the file is missing, damaged or of another kind, holds more than tensors and plain values, or
            needs a library that is not installed.
    """
    check_suffix(path)
    if path.is_dir():
        raise UserError(f'{path} is a directory; name the file in it that holds the weights.')
    try:
        with path.open('rb') as file:
            if not file.read(1):
                raise UserError(f'{path} is empty.')
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}).') from error
    # Neither library is required, and importing torch takes seconds, so each is imported only when it is needed.
    if path.suffix == '.safetensors':
        from aft_jax.interchange import safetensors_file

        tensors, notes = safetensors_file.decode(path)
        wrapper = ''
    else:
        from aft_jax.interchange import torch_file

        tensors, wrapper, notes = torch_file.decode(path)
    if not tensors:
        raise UserError(f'{path} holds no tensors.')
    return StateFile(path, tensors, wrapper, notes)


def write(path: Path, state: StateFile) -> None:
    """Writes the tensors of `state` in the format of the suffix of `path`.

    A torch file gets the wrapper and the notes of `state`. A .safetensors file has no wrapper, and gets the notes only
    if `state` came from a .safetensors file.

    Raises:
        UserError: If the path is that of `state`, cannot be written, or needs a library that is not installed.
    """
    check_suffix(path)
    if path.exists() and state.path.exists() and path.samefile(state.path):
        raise UserError(f'{path} is the file that the model came from; name another one to write.')
    if path.suffix == '.safetensors':
        from aft_jax.interchange import safetensors_file

        notes = state.notes if state.path.suffix == '.safetensors' else {}
        content = safetensors_file.encode(state.tensors, notes)
    else:
        from aft_jax.interchange import torch_file

        content = torch_file.encode(state.tensors, state.wrapper, state.notes if state.wrapper else {})
    try:
        write_bytes(path, content)
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error.strerror}); name another file.') from error


def check_suffix(path: Path) -> None:
    """Checks that the suffix tells the kind of file; raises a UserError if it does not."""
    if path.suffix not in SUFFIXES:
        raise UserError(f'{path} should end in {", ".join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.')


def checksum(path: Path) -> str:
    """Computes the SHA-256 of a file, in hexadecimal digits."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
