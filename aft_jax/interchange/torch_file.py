"""PyTorch's own format, a pickle of tensors. This module and `torch_model` alone import torch.

A pickle is a program. torch's restricted loader only builds tensors and plain containers, and refuses everything else.
Placeholders stand for some harmless objects beside the weights, see `inert`.
"""

import io
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aft_jax.errors import UserError
from aft_jax.interchange.convert import BFLOAT16
from aft_jax.interchange.inert import StoredArray, placeholders

try:
    import torch
except ImportError as error:
    raise UserError('a .pt or .pth file needs PyTorch; pip install torch, or convert it to .safetensors.') from error

# Keys under which releases store the state dict in a larger dictionary; the first that exists is used.
WRAPPERS = (
    'model',
    'netC',
    'state_dict',
    'model_state_dict',
    'net',
    'net_state_dict',
    'weights',
    'model_state',
    'params',
)
# Parts of a file that hold tensors of the training and not of the network.
OF_TRAINING = ('optim', 'sched', 'scaler', 'amp', 'loops', 'callbacks', 'rng')
DEEPEST = 4


def decode(path: Path) -> tuple[dict[str, np.ndarray], str, dict[str, Any]]:
    """Reads the state dict, its key in the file or '', and the strings and integers beside it.

    Raises:
        UserError: If the file is damaged, has no state dict, or holds more than tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals(placeholders()), warnings.catch_warnings():
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
        elif isinstance(tensor, StoredArray) and (array := tensor.array()) is not None:
            tensors[str(name)] = array
    notes = {name: value for name, value in loaded.items() if _is_plain(value)} if wrapper else {}
    return tensors, wrapper, notes


def encode(tensors: dict[str, np.ndarray], wrapper: str, notes: dict[str, Any]) -> bytes:
    """Encodes a state dict as the content of a file; a `wrapper` such as 'a/b' puts it under keys, beside `notes`."""
    content: Any = OrderedDict((name, _to_torch(array)) for name, array in tensors.items())
    for key in reversed(wrapper.split('/') if wrapper else ()):
        content = {key: content}
    buffer = io.BytesIO()
    torch.save({**notes, **content} if wrapper else content, buffer)
    return buffer.getvalue()


def _state_dict(loaded: Any) -> tuple[str, dict | None]:
    """Finds the state dict in the content of a file, and the keys that lead to it, as 'a/b'."""
    if not isinstance(loaded, dict):
        return '', None
    found = dict(_with_tensors(loaded, ''))
    for wrapper in WRAPPERS:
        if wrapper in found:
            return wrapper, found[wrapper]
    if '' in found or not found:
        return '', found.get('')
    # The one with the most tensors; of equal ones the first.
    largest = max(found, key=lambda place: sum(map(_is_tensor, found[place].values())))
    return largest, found[largest]


def _with_tensors(content: dict, place: str, depth: int = 0) -> Iterator[tuple[str, dict]]:
    """Yields the dictionaries in a dictionary, itself included, that hold tensors by name, with their places."""
    if any(isinstance(name, str) and _is_tensor(value) for name, value in content.items()):
        yield place, content
    for name, value in content.items():
        of_training = isinstance(name, str) and name.lower().startswith(OF_TRAINING)
        if isinstance(value, dict) and isinstance(name, str) and not of_training and depth < DEEPEST:
            yield from _with_tensors(value, f'{place}/{name}'.lstrip('/'), depth + 1)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, StoredArray) and value.array() is not None)


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
