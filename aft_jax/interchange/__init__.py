"""Import of networks trained in PyTorch, and export back into a file of the same form.

    suspect = load(Path('attack_result.pt'))
    variables = purify(suspect.architecture, suspect.variables)
    save(Path('purified.pt'), variables, suspect)

No code in a file is ever run. Our networks normalise images inside (`config.model.mean` and `std`), most torch networks
expect normalised images. The weights do not tell mean and std, so the config has to.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from aft_jax.errors import UserError
from aft_jax.interchange.architecture import Architecture, detect, match
from aft_jax.interchange.convert import BFLOAT16, to_flax, to_torch
from aft_jax.interchange.state_file import StateFile, read, write
from aft_jax.interchange.torch_names import COUNTER, namings

DTYPES = (np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64))


class Imported(NamedTuple):
    """A network of a PyTorch file.

    Attributes:
        architecture: Kind and sizes of the network.
        variables: {'params', 'batch_stats'}, float32 NumPy arrays.
        keys: Flax path -> key in the file.
        flat: Path of the dense layer's kernel that reads flattened feature maps, or ''.
        source: Content of the file.
    """

    architecture: Architecture
    variables: dict
    keys: dict[str, str]
    flat: str
    source: StateFile


def load(path: Path, mapping: Path | None = None) -> Imported:
    """Loads a network from a file of PyTorch weights.

    Args:
        path: A .safetensors, .pt, .pth or .pth.tar file; see `state_file.read`.
        mapping: JSON file {key in the file: Flax path}, such as {"backbone.first.weight": "params/stem/kernel"}, for
            keys with unusual names. null instead of a path ignores a tensor. Flax paths are those of the module's
            variables. Other keys are read by their usual names.

    Returns:
        The network with its weights.

    Raises:
        UserError: If a file cannot be read or holds none of our networks, a key is missing, unknown or of another
            shape, or a value is not finite.
    """
    source = read(path)
    matched = match(source.tensors, read_mapping(mapping) if mapping else {}, str(path))
    architecture = detect(matched, source.tensors, str(path))
    flat = matched.naming.flat[0] if matched.naming.flat else ''
    leaves, keys = {}, {}
    for key, ours in matched.naming.paths.items():
        name = matched.keys[key]
        values = checked(source.tensors[name], name, path)
        if ours.endswith('/var') and values.min(initial=0) < 0:
            raise UserError(f'{name} of {path} has negative variances.')
        leaves[ours], keys[ours] = to_flax(values, architecture.flat_side if key == flat else 0), name
    return Imported(
        architecture, unflatten_dict(leaves, sep='/'), keys, matched.naming.paths[flat] if flat else '', source
    )


def stored_normalisation(imported: Imported) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Finds the mean and the standard deviation that a layer before the network subtracts and divides by.

    Such a layer stores them beside the network, as 'normalize.mean' and 'normalize.std' or with another prefix.

    Returns:
        Mean and deviation, one value or one a channel; None if the file has none.
    """
    tensors, used = imported.source.tensors, set(imported.keys.values())
    for key, mean in tensors.items():
        std = tensors.get(f'{key.removesuffix("mean")}std')
        if key in used or key.rpartition('.')[2] != 'mean' or std is None or mean.dtype not in DTYPES:
            continue
        if mean.size == std.size and mean.size in (1, imported.architecture.channels) and (std > 0).all():
            return tuple(map(float, mean.ravel())), tuple(map(float, std.ravel()))
    return None


def save(path: Path, variables: Mapping[str, Any], imported: Imported) -> None:
    """Writes variables in the form of the imported file: with its keys, their order and their dtypes.

    Tensors without a variable (BatchNorm's counters of batches, tensors that the mapping ignores) keep their values.

    Args:
        path: File to write; its suffix chooses the form.
        variables: {'params', 'batch_stats'} of the same network.
        imported: The network as it was imported.

    Raises:
        UserError: If the file cannot be written, or a value is not finite in the dtype of the file.
    """
    arrays = {place: np.asarray(leaf) for place, leaf in flatten_dict(variables, sep='/').items()}
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
    """Converts a network of our own to an `Imported`, so that it can be saved for torch.

    Its keys are those of torchvision or the releases (see `torch_names`), its dtype is float32, and its counters of
    batches are 0.

    Args:
        architecture: Kind and sizes of the network.
        variables: {'params', 'batch_stats'}.
    """
    naming = next(naming for naming in namings() if naming.describes(architecture.name, architecture.options))
    flat = naming.flat[0] if naming.flat else ''
    leaves = {place: np.asarray(leaf, np.float32) for place, leaf in flatten_dict(variables, sep='/').items()}
    tensors: dict[str, np.ndarray] = {}
    for key, ours in naming.paths.items():
        tensors[key] = to_torch(leaves[ours], architecture.flat_side if key == flat else 0)
        if ours.endswith('/var'):
            tensors[f'{key.rpartition(".")[0]}.{COUNTER}'] = np.zeros((), np.int64)
    keys = {ours: key for key, ours in naming.paths.items()}
    source = StateFile(Path(), tensors)
    return Imported(architecture, unflatten_dict(leaves, sep='/'), keys, naming.paths[flat] if flat else '', source)


def read_mapping(path: Path) -> dict[str, str | None]:
    """Reads a mapping file; see `load`.

    Raises:
        UserError: If the file is missing, or is not a JSON object of strings and nulls.
    """
    try:
        mapping = json.loads(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise UserError(f'the mapping file {path} cannot be read ({error.strerror}).') from error
    except ValueError as error:
        raise UserError(f'the mapping file {path} is not JSON: {error}.') from error
    if not isinstance(mapping, dict) or not all(value is None or isinstance(value, str) for value in mapping.values()):
        raise UserError(f'the mapping file {path} should be an object of keys and paths: {{"their.key": "our/path"}}.')
    return mapping


def checked(tensor: np.ndarray, name: str, path: Path) -> np.ndarray:
    """Converts a tensor of weights to float32.

    Raises:
        UserError: If it does not hold finite floating-point numbers.
    """
    if tensor.dtype not in DTYPES:
        raise UserError(f'{name} of {path} is of {tensor.dtype}; weights should be floating-point numbers.')
    with np.errstate(over='ignore'):
        values = tensor.astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(f'{name} of {path} has values that are not finite (NaN or infinity) in float32.')
    return values
