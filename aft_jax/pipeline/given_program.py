"""The weights of a given PyTorch program (`model.torch` or a .pt2 file): from the state dict of a file, and back."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from aft_jax import interchange
from aft_jax.errors import UserError, nearest
from aft_jax.files import write_bytes
from aft_jax.interchange import program_file, state_file
from aft_jax.interchange.program import COUNTER, Program, to_torch, to_variables
from aft_jax.interchange.state_file import StateFile

# Largest number of keys that a message lists.
SHOWN = 5


class FromProgram(NamedTuple):
    """Origin of a PyTorch program whose weights are in a file.

    Attributes:
        source: Content of the file.
        program: Program; None until it is known.
        prefix: Beginning of the file's keys, such as 'module.'.
    """

    source: StateFile
    program: Program | None = None
    prefix: str = ''


def read(path: Path) -> FromProgram:
    """Reads the state dict of a file; that of a .pt2 file stands beside its graph.

    Raises:
        UserError: The file cannot be read.
    """
    if path.suffix == '.pt2':
        return FromProgram(StateFile(path, program_file.read(path).tensors))
    return FromProgram(state_file.read(path))


def bind(origin: FromProgram, program: Program) -> tuple[FromProgram, dict]:
    """Checks that a state dict is that of a program, and converts it to variables.

    Args:
        origin: Content of the file.
        program: Program.

    Returns:
        The origin with the program, and the variables.

    Raises:
        UserError: Keys are missing or unknown, a tensor has another shape, or a value is not finite.
    """
    tensors, path = origin.source.tensors, origin.source.path
    expected = program.file.tensors
    prefix = _prefix(tensors, expected)
    stripped = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    missing = [key for key in expected if key not in stripped and not key.endswith(COUNTER)]
    extra = [key for key in tensors if not key.startswith(prefix) or key[len(prefix) :] not in expected]
    faults = []
    if missing:
        faults.append(f'lacks {_listed(missing, extra)}')
    if extra:
        faults.append(f'has {_listed(extra, missing)} too many')
    if faults:
        raise UserError(f'{path} is not a state dict of {program.source}: it {" and ".join(faults)}.')
    wrong = [key for key, tensor in stripped.items() if tensor.shape != expected[key].shape]
    if wrong:
        shapes = ', '.join(f'{key} {stripped[key].shape} instead of {expected[key].shape}' for key in wrong[:SHOWN])
        raise UserError(f'{path} has the keys of {program.source}, but not its shapes: {shapes}.')
    values = {}
    for key in program.places:
        tensor = stripped.get(key, expected[key])
        values[key] = tensor if key.endswith(COUNTER) else interchange.checked(tensor, key, path)
        if key.endswith('running_var') and values[key].min(initial=0) < 0:
            raise UserError(f'{key} of {path} has negative variances.')
    for leaf in program.graph.leaves.values():
        fixed = leaf.key in stripped and leaf.key not in program.places and leaf.kind == 'buffer'
        if fixed and not leaf.key.endswith(COUNTER) and not np.array_equal(stripped[leaf.key], expected[leaf.key]):
            raise UserError(f'{leaf.key} of {path} has other values than in {program.source}, which cannot be changed.')
    return FromProgram(origin.source, program, prefix), to_variables(program, values)


def save(path: Path, variables: Mapping[str, Any], origin: FromProgram) -> None:
    """Writes variables in the form of the file: with its keys, their order and their dtypes.

    Tensors that the graph does not use keep their values.

    Args:
        path: File to write. The suffix .pt2 writes the program too.
        variables: {'params', 'batch_stats'} of the program.
        origin: Origin with the program.

    Raises:
        UserError: The file cannot be written, or a value is not finite in the dtype of the file.
    """
    program, prefix = origin.program, origin.prefix
    assert program is not None
    leaves = flatten_dict(variables)
    tensors = dict(origin.source.tensors)
    for key, place in program.places.items():
        name = f'{prefix}{key}'
        if name not in tensors:  # a counter of batches that the file lacks
            continue
        tensor, before = to_torch(leaves[place], place), tensors[name]
        with np.errstate(over='ignore'):
            tensor = (np.rint(tensor) if key.endswith(COUNTER) else tensor).astype(before.dtype)
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise UserError(f'{key} has values that are not finite in {before.dtype}, so {path} is not written.')
        tensors[name] = tensor
    if path.suffix == '.pt2':
        values = {key: tensors[f'{prefix}{key}'] for key in program.file.tensors}
        try:
            write_bytes(path, program_file.encode(program.file, values))
        except OSError as error:
            raise UserError(f'{path} cannot be written ({error.strerror}); name another file.') from error
    else:
        state_file.write(path, origin.source._replace(tensors=tensors))


def _prefix(tensors: Iterable[str], expected: Iterable[str]) -> str:
    """Finds the beginning of the file's keys behind which most keys of the program stand; the shortest of several."""
    tensors, expected = set(tensors), list(expected)
    last = max(expected, key=len)
    prefixes = {''} | {name.removesuffix(last) for name in tensors if name.endswith(f'.{last}')}
    return max(sorted(prefixes, key=len), key=lambda prefix: sum(f'{prefix}{key}' in tensors for key in expected))


def _listed(keys: list[str], others: list[str]) -> str:
    shown = []
    for key in keys[:SHOWN]:
        near = nearest(key, others)
        shown.append(f'{key} (nearest: {near})' if near else key)
    more = f' and {len(keys) - SHOWN} more' if len(keys) > SHOWN else ''
    return f'{len(keys)} {"key" if len(keys) == 1 else "keys"} ({", ".join(shown)}{more})'
