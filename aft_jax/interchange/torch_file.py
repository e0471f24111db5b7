"""PyTorch's own format, a pickle of tensors. This module and `torch_model` alone import torch.

A pickle is a program. torch's restricted loader only builds tensors and plain containers, and refuses everything else.
BackdoorBench stores NumPy arrays beside its weights. An empty placeholder replaces them, so that NumPy never processes
untrusted data.
"""

import io
import pickle
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from aft_jax.errors import UserError
from aft_jax.interchange.convert import BFLOAT16

try:
    import torch
except ImportError as error:
    raise UserError('a .pt or .pth file needs PyTorch; pip install torch, or convert it to .safetensors.') from error

# Keys under which releases store the state dict in a larger dictionary; the first that exists is used.
WRAPPERS = ('model', 'netC', 'state_dict', 'model_state_dict', 'net', 'net_state_dict')
NUMPY_NAMES = (
    'numpy.core.multiarray._reconstruct',
    'numpy._core.multiarray._reconstruct',
    'numpy.core.multiarray.scalar',
    'numpy._core.multiarray.scalar',
    'numpy.ndarray',
    'numpy.dtype',
)


class LeftOut:
    """A placeholder for any NumPy object in a file."""

    def __init__(self, *arguments: Any):
        """Ignores all arguments."""

    def __setstate__(self, state: Any) -> None:
        """Ignores the state."""


def decode(path: Path) -> tuple[dict[str, np.ndarray], str, dict[str, Any]]:
    """Reads the state dict, its key in the file or '', and the strings and integers beside it.

    Raises:
        UserError: If the file is damaged, has no state dict, or holds more than tensors and plain values.
    """
    try:
        stand_ins: list[Any] = [(LeftOut, name) for name in NUMPY_NAMES]
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about old formats; whatever cannot be read is an error
            loaded = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises errors of many kinds about the file.
        if name := re.search(r'GLOBAL ([\w.]+)', str(error)):
            raise UserError(
                f'{path} holds more than tensors ({name[1]}), and loading it could run code of its author; save '
                'model.state_dict() alone, or as .safetensors.'
            ) from error
        reason = 'holds more than tensors, or' if isinstance(error, pickle.UnpicklingError) else 'cannot be read:'
        raise UserError(f'{path} {reason} it is damaged, cut short, or not a file of PyTorch.') from error
    wrapper, state = _state_dict(loaded)
    if state is None:
        raise UserError(f'{path} holds no state dict, neither at the top level nor under {", ".join(WRAPPERS)}.')
    tensors = {}
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            tensors[str(name)] = _to_numpy(tensor, str(name), path)
    notes = {name: value for name, value in loaded.items() if _is_plain(value)} if wrapper else {}
    return tensors, wrapper, notes


def encode(tensors: dict[str, np.ndarray], wrapper: str, notes: dict[str, Any]) -> bytes:
    """Encodes a state dict as the content of a file; a `wrapper` puts it under this key, beside `notes`."""
    state = OrderedDict((name, _to_torch(array)) for name, array in tensors.items())
    buffer = io.BytesIO()
    torch.save({**notes, wrapper: state} if wrapper else state, buffer)
    return buffer.getvalue()


def _state_dict(loaded: Any) -> tuple[str, dict | None]:
    if not isinstance(loaded, dict):
        return '', None
    for wrapper in WRAPPERS:
        if _has_tensors(loaded.get(wrapper)):
            return wrapper, loaded[wrapper]
    return '', loaded if _has_tensors(loaded) else None


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, torch.Tensor) for item in value.values())


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, int | str) for item in value)
    return isinstance(value, int | str)


def _to_numpy(tensor: torch.Tensor, name: str, path: Path) -> np.ndarray:
    try:
        tensor = tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(BFLOAT16)
        return tensor.numpy()
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise UserError(f'{name} of {path} is not a plain tensor ({tensor.dtype}, {tensor.layout}).') from error


def _to_torch(array: np.ndarray) -> torch.Tensor:
    # A copy, because torch requires writable memory.
    array = np.array(array, order='C')
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
