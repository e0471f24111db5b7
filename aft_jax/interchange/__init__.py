"""Networks that were trained in PyTorch: into Flax variables, and back into the very file that they came from.

    suspect = load(Path('attack_result.pt'))
    variables = purify(suspect.architecture, suspect.variables)
    save(Path('purified.pt'), variables, suspect)

No code of a file is ever run. Images are normalised inside our networks (`config.model.mean` and `std`) and mostly
before those of torch; that is not in the weights, so the import changes nothing about it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aft_jax.errors import UserError
from aft_jax.interchange.architecture import Architecture, detect, match
from aft_jax.interchange.convert import BFLOAT16, by_path, nested, to_flax, to_torch
from aft_jax.interchange.state_file import StateFile, read, write
from aft_jax.interchange.torch_names import COUNTER, namings

DTYPES = (np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64))


class Imported(NamedTuple):
    """A network of a PyTorch file.

    Attributes:
        architecture: What it is.
        variables: {'params', 'batch_stats'}, float32 NumPy arrays.
        keys: Our path -> the file's key.
        flat: Path of the dense layer's kernel that reads flattened feature maps, or ''.
        source: The file's content.
    """

    architecture: Architecture
    variables: dict
    keys: dict[str, str]
    flat: str
    source: StateFile


def load(path: Path, mapping: Path | None = None) -> Imported:
    """Reads a network.

    Args:
        path: A .safetensors, .pt, .pth or .pth.tar file; see `files.read`.
        mapping: A JSON file {key of the file: our path}, such as {"backbone.first.weight": "params/stem/kernel"}, for
            keys under unusual names; null instead of a path leaves a tensor aside. Our paths are those of the module's
            variables. Keys that are not in it are read by their usual names.

    Returns:
        The network with its weights.

    Raises:
        UserError: A file cannot be read, or what it holds is none of our networks, or not one that computes: a key is
            missing, too many or of another shape, or a value is not finite.
    """
    source = read(path)
    found = match(source.tensors, read_mapping(mapping) if mapping else {}, str(path))
    architecture = detect(found, source.tensors, str(path))
    flat = found.naming.flat[0] if found.naming.flat else ''
    leaves, keys = {}, {}
    for key, ours in found.naming.paths.items():
        name = found.keys[key]
        values = _checked(source.tensors[name], name, path)
        if ours.endswith('/var') and values.min(initial=0) < 0:
            raise UserError(f'{name} of {path} has negative variances.')
        leaves[ours], keys[ours] = to_flax(values, architecture.flat_side if key == flat else 0), name
    return Imported(architecture, nested(leaves), keys, found.naming.paths[flat] if flat else '', source)


def save(path: Path, variables: Mapping[str, Any], imported: Imported) -> None:
    """Writes variables in the form of the file that the network came from: its keys, their order and its dtypes.

    What the variables do not have (BatchNorm's counters of batches, and what a mapping left aside) stays as it was.

    Args:
        path: To be written; its suffix chooses the form.
        variables: {'params', 'batch_stats'} of the same network.
        imported: Where it came from.

    Raises:
        UserError: The file cannot be written, or a value is not finite, or not in the dtype that it must have.
    """
    arrays = {place: np.asarray(leaf) for place, leaf in by_path(variables).items()}
    if arrays.keys() != imported.keys.keys():
        raise ValueError(f'not variables of {imported.architecture}')
    tensors = dict(imported.source.tensors)
    for ours, name in imported.keys.items():
        tensor = to_torch(arrays[ours], imported.architecture.flat_side if ours == imported.flat else 0)
        before = tensors[name]
        if tensor.shape != before.shape:
            raise ValueError(f'{ours} has become {tensor.shape} from {before.shape}')
        with np.errstate(over='ignore'):
            tensors[name] = tensor.astype(before.dtype)
        if not np.isfinite(tensors[name].astype(np.float32)).all():
            raise UserError(f'{ours} has values that are not finite in {before.dtype}, so {path} is not written.')
    write(path, imported.source._replace(tensors=tensors))


def with_usual_names(architecture: Architecture, variables: Mapping[str, Any]) -> Imported:
    """Returns a network of our own as if it had been imported, so that it can be saved for torch.

    Its keys are those of torchvision or the releases (see `names`), its dtype is float32, its counters of batches 0.

    Args:
        architecture: What it is.
        variables: {'params', 'batch_stats'}.
    """
    naming = next(found for found in namings() if found.describes(architecture.name, architecture.options))
    flat = naming.flat[0] if naming.flat else ''
    leaves = {place: np.asarray(leaf, np.float32) for place, leaf in by_path(variables).items()}
    tensors: dict[str, np.ndarray] = {}
    for key, ours in naming.paths.items():
        tensors[key] = to_torch(leaves[ours], architecture.flat_side if key == flat else 0)
        if ours.endswith('/var'):
            tensors[f'{key.rpartition(".")[0]}.{COUNTER}'] = np.zeros((), np.int64)
    keys = {ours: key for key, ours in naming.paths.items()}
    source = StateFile(Path(), tensors)
    return Imported(architecture, nested(leaves), keys, naming.paths[flat] if flat else '', source)


def read_mapping(path: Path) -> dict[str, str | None]:
    """Reads a mapping file; see `load`.

    Raises:
        UserError: It is not there, or no JSON object of texts and nulls.
    """
    try:
        mapping = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f'the mapping file {path} cannot be read ({error.strerror}).') from error
    except ValueError as error:
        raise UserError(f'the mapping file {path} is no JSON: {error}.') from error
    if not isinstance(mapping, dict) or not all(value is None or isinstance(value, str) for value in mapping.values()):
        raise UserError(f'the mapping file {path} should be an object of keys and paths: {{"their.key": "our/path"}}.')
    return mapping


def _checked(tensor: np.ndarray, name: str, path: Path) -> np.ndarray:
    if tensor.dtype not in DTYPES:
        raise UserError(f'{name} of {path} is of {tensor.dtype}; weights should be floating-point numbers.')
    with np.errstate(over='ignore'):
        values = tensor.astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(f'{name} of {path} has values that are not finite (NaN or infinity) in float32.')
    return values
