"""Conversion of tensors between the layouts of torch and Flax. Both ways are permutations, so nothing is lost.

- Convolution: [out, in, h, w] <-> [h, w, in, out].
- Dense: [out, in] <-> [in, out]. A layer that reads flattened feature maps has its inputs in the order (c, h, w) in
  torch and (h, w, c) in Flax, so its inputs are permuted too.
- BatchNorm: unchanged. torch's running variance is the unbiased estimate and Flax's the biased one, but both divide by
  it in evaluation.
"""

import jax.numpy as jnp
import numpy as np

BFLOAT16 = np.dtype(jnp.bfloat16)


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Computes the shape in torch of a Flax variable with this shape."""
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def to_flax(tensor: np.ndarray, flat_side: int = 0) -> np.ndarray:
    """Converts one tensor of torch to Flax's layout.

    Args:
        tensor: Kernel of a convolution or a dense layer, or a vector.
        flat_side: Side in pixels of the feature maps that a dense layer reads flattened, else 0.
    """
    if tensor.ndim == 4:
        return np.ascontiguousarray(tensor.transpose(2, 3, 1, 0))
    if tensor.ndim == 2 and flat_side:
        maps = tensor.reshape(len(tensor), -1, flat_side, flat_side)
        return np.ascontiguousarray(maps.transpose(2, 3, 1, 0).reshape(-1, len(tensor)))
    return np.ascontiguousarray(tensor.T)


def to_torch(array: np.ndarray, flat_side: int = 0) -> np.ndarray:
    """Converts one Flax variable to torch's layout: the inverse of `to_flax`."""
    if array.ndim == 4:
        return np.ascontiguousarray(array.transpose(3, 2, 0, 1))
    if array.ndim == 2 and flat_side:
        maps = array.reshape(flat_side, flat_side, -1, array.shape[1])
        return np.ascontiguousarray(maps.transpose(3, 2, 0, 1).reshape(array.shape[1], -1))
    return np.ascontiguousarray(array.T)
