"""Tensors from torch's layout to Flax's and back; both ways are permutations, so nothing is lost.

- Convolution: [out, in, h, w] <-> [h, w, in, out].
- Dense: [out, in] <-> [in, out]. Where it reads flattened feature maps, torch counts channels first and Flax last, so
  its inputs change places too: (c, h, w) <-> (h, w, c).
- BatchNorm: as it is. torch's running variance is the unbiased estimate and Flax's the biased one, but either is what
  evaluation divides by.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BFLOAT16 = np.dtype(jnp.bfloat16)


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns torch's shape of a variable of ours."""
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def to_flax(tensor: np.ndarray, flat_side: int = 0) -> np.ndarray:
    """Returns one tensor of torch's in our layout.

    Args:
        tensor: Of a convolution, a dense layer or a vector.
        flat_side: For a dense layer that reads flattened feature maps: their side in pixels.
    """
    if tensor.ndim == 4:
        return np.ascontiguousarray(tensor.transpose(2, 3, 1, 0))
    if tensor.ndim == 2 and flat_side:
        maps = tensor.reshape(len(tensor), -1, flat_side, flat_side)
        return np.ascontiguousarray(maps.transpose(2, 3, 1, 0).reshape(-1, len(tensor)))
    return np.ascontiguousarray(tensor.T)


def to_torch(array: np.ndarray, flat_side: int = 0) -> np.ndarray:
    """Returns one variable of ours in torch's layout: the inverse of `to_flax`."""
    if array.ndim == 4:
        return np.ascontiguousarray(array.transpose(3, 2, 0, 1))
    if array.ndim == 2 and flat_side:
        maps = array.reshape(flat_side, flat_side, -1, array.shape[1])
        return np.ascontiguousarray(maps.transpose(3, 2, 0, 1).reshape(array.shape[1], -1))
    return np.ascontiguousarray(array.T)


def by_path(tree: Any) -> dict[str, Any]:
    """Returns {'a/b': leaf} for {'a': {'b': leaf}}."""
    return {'/'.join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(leaves: Mapping[str, np.ndarray]) -> dict:
    """Returns {'a': {'b': leaf}} for {'a/b': leaf}: the inverse of `by_path`."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, last = path.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
