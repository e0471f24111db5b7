"""The .safetensors format: tensors and strings, no code. Only this module imports the library."""

from pathlib import Path

import numpy as np

from aft_jax.errors import UserError

try:
    import safetensors
    import safetensors.numpy
except ImportError as error:
    raise UserError("a .safetensors file needs the safetensors library; pip install 'aft_jax[interchange]'.") from error


def decode(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the tensors and the metadata of a file; raises a UserError if it is damaged."""
    try:
        with safetensors.safe_open(path, 'np') as file:
            return {name: file.get_tensor(name) for name in file.offset_keys()}, file.metadata() or {}
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f'{path} cannot be read as .safetensors: it is damaged, cut short, or another kind of file.'
        ) from error


def encode(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """Encodes tensors and metadata as the content of a file."""
    whole = {name: np.asarray(array, order='C') for name, array in tensors.items()}
    return safetensors.numpy.save(whole, metadata or {'format': 'pt'})
