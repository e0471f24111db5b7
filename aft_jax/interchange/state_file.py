"""Files of tensors: .safetensors, and PyTorch's .pt and .pth, of which nothing but tensors is ever loaded."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aft_jax.errors import UserError
from aft_jax.files import write_bytes

TORCH_SUFFIXES = ('.pt', '.pth', '.tar')  # the last is that of .pth.tar
SUFFIXES = (*TORCH_SUFFIXES, '.safetensors')


class StateFile(NamedTuple):
    """What a file holds.

    Attributes:
        path: Where it lies.
        tensors: The state dict, in its order and its dtypes, by the keys that it has there.
        wrapper: Key of the dictionary that the state dict lies under, or '' where it is the file's only content.
        notes: What else is kept: of a torch file the texts and whole numbers beside the state dict (such as
            BackdoorBench's model_name), of a .safetensors file its metadata.
    """

    path: Path
    tensors: dict[str, np.ndarray]
    wrapper: str = ''
    notes: dict[str, Any] = {}


def read(path: Path) -> StateFile:
    """Reads a state dict without running anything that the file holds.

    Args:
        path: A .safetensors file; or a .pt, .pth or .pth.tar file with a state dict, or with a dictionary that has one
            under 'model', 'netC', 'state_dict' and the like.

    Raises:
        UserError: There is no such file, it is no such file or damaged, it holds more than tensors and plain values, or
            the library that reads it is not installed.
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
    # Whichever library is there is imported when it is needed: torch alone takes seconds, and neither is required.
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
    """Writes the tensors of `state`, in the form that the suffix of `path` names; `state.path` is left alone.

    In a torch file they lie under the wrapper, with the notes beside it; a .safetensors file has no wrapper, and keeps
    the notes of a .safetensors file alone.

    Raises:
        UserError: The path is that of `state`, cannot be written, or needs a library that is not installed.
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
    """Raises a UserError for a name from which the kind of file cannot be told."""
    if path.suffix not in SUFFIXES:
        raise UserError(f'{path} should end in {", ".join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.')


def checksum(path: Path) -> str:
    """Returns the sha256 of a file, in hexadecimal digits."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
