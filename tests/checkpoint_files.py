"""Reader of checkpoints that uses only Orbax, for checkpoints written by any number of devices."""

from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp


def final_arrays(directory: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a stage's newest checkpoint, by path."""
    newest = max((p for p in directory.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    checkpointer = ocp.StandardCheckpointer()
    stored = checkpointer.metadata(newest / 'state').item_metadata.tree
    template = _map(stored, lambda leaf: np.zeros(leaf.shape, leaf.dtype))
    return dict(_leaves(checkpointer.restore(newest / 'state', template), ''))


def _map(tree, function):
    if isinstance(tree, dict):
        return {name: _map(child, function) for name, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [_map(child, function) for child in tree]
    return None if tree is None else function(tree)


def _leaves(tree, path: str):
    if isinstance(tree, dict):
        for name, child in tree.items():
            yield from _leaves(child, f'{path}/{name}')
    elif isinstance(tree, list | tuple):
        for i, child in enumerate(tree):
            yield from _leaves(child, f'{path}/{i}')
    elif tree is not None:
        yield path, tree
