"""Files of tensors: .safetensors, and PyTorch's .pt and .pth, from which only tensors and plain values are loaded."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aft_jax.errors import UserError
from aft_jax.files import write_bytes
from aft_jax.interchange.file_kind import SAFETENSORS, TORCH, file_kind

TORCH_SUFFIXES = ('.pt', '.pth', '.tar')  # .tar stands for .pth.tar


class StateFile(NamedTuple):
    """The content of a file.

    Attributes:
        path: Path of the file.
        tensors: State dict with the keys, the order and the dtypes of the file.
        wrapper: Key of the dictionary in the file that holds the state dict, or '' if the file is the state dict.
        notes: Strings and integers beside the state dict of a torch file (such as BackdoorBench's model_name), or the
            metadata of a .safetensors file.
        kind: SAFETENSORS or TORCH.
    """

    path: Path
    tensors: dict[str, np.ndarray]
    wrapper: str = ''
    notes: dict[str, Any] = {}
    kind: str = TORCH


def read(path: Path) -> StateFile:
    """Reads a state dict without running code from the file.

    Args:
        path: A file of torch or of safetensors; its content tells which, and not its ending. A torch file holds a state
            dict, or a dictionary with a state dict under a key such as 'model', 'netC' or 'state_dict'.

    Raises:
        UserError: If the file is missing, damaged or of another kind, holds more than tensors and plain values, or
            needs a library that is not installed.
    """
    kind = file_kind(path)
    # Neither library is required, and importing torch takes seconds, so each is imported only when it is needed.
    if kind == SAFETENSORS:
        from aft_jax.interchange import safetensors_file

        tensors, notes = safetensors_file.decode(path)
        wrapper = ''
    else:
        from aft_jax.interchange import torch_file

        tensors, wrapper, notes = torch_file.decode(path)
    if not tensors:
        raise UserError(f'{path} holds no tensors.')
    return StateFile(path, tensors, wrapper, notes, kind)


def write(path: Path, state: StateFile) -> None:
    """Writes the tensors of `state` in the format of the suffix of `path`; with another suffix in the kind of `state`.

    A torch file gets the wrapper and the notes of `state`. A .safetensors file has no wrapper, and gets the notes only
    if `state` came from a .safetensors file.

    Raises:
        UserError: If the path is that of `state`, cannot be written, or needs a library that is not installed.
    """
    kind = {'.safetensors': SAFETENSORS, **dict.fromkeys(TORCH_SUFFIXES, TORCH)}.get(path.suffix, state.kind)
    if path.exists() and state.path.exists() and path.samefile(state.path):
        raise UserError(f'{path} is the file that the model came from; name another one to write.')
    if kind == SAFETENSORS:
        from aft_jax.interchange import safetensors_file

        notes = state.notes if state.kind == SAFETENSORS else {}
        content = safetensors_file.encode(state.tensors, notes)
    else:
        from aft_jax.interchange import torch_file

        content = torch_file.encode(state.tensors, state.wrapper, state.notes if state.wrapper else {})
    try:
        write_bytes(path, content)
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error.strerror}); name another file.') from error


def checksum(path: Path) -> str:
    """Computes the SHA-256 of a file, in hexadecimal digits."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
