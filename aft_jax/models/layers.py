"""Layers that the classifiers share."""

import math
from functools import reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from aft_jax.ops.batch_norm import BatchNorm
from aft_jax.ops.convolution import convolve


def batch_norm(x: jax.Array, *, train: bool, dtype: Any, name: str | None = None) -> jax.Array:
    """Applies BatchNorm over all axes but the last, computed in float32, returned in `dtype`.

    Flax keeps 0.9 of the running statistics, which torch calls momentum 0.1.
    """
    norm = BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)
    return norm(x.astype(jnp.float32)).astype(dtype)


def conv(channels: int, kernel: int, stride: int, *, dtype: Any, use_bias: bool, name: str | None = None) -> nn.Conv:
    """Builds a square convolution, padded as in torch with padding=(kernel - 1) // 2 on every side."""
    margin = (kernel - 1) // 2
    return nn.Conv(
        channels,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((margin, margin), (margin, margin)),
        use_bias=use_bias,
        conv_general_dilated=convolve,
        dtype=dtype,
        name=name,
    )


def max_pool(x: jax.Array, size: int, stride: int, margin: int) -> jax.Array:
    """Computes the maximum of each window of `size` x `size` pixels, `stride` apart, in padded maps.

    It consists of pairwise maxima, whose gradient is deterministic on a GPU as well. If several pixels are the largest,
    the gradient is shared among them, while torch gives it to one.

    Args:
        x: [B, H, W, C].
        size: Side of the window in pixels.
        stride: Distance between windows in pixels.
        margin: Padding of minus infinity in pixels, at most `size` - 1.

    Returns:
        [B, H', W', C], H' = floor((H + 2 margin - size) / stride) + 1.

    Raises:
        ValueError: If the maps are smaller than the window.
    """
    for axis in (1, 2):
        widths = [(0, 0)] * 4
        widths[axis] = (margin, margin)
        padded = jnp.pad(x, widths, constant_values=-jnp.inf)
        reach = padded.shape[axis] - size
        if reach < 0:
            raise ValueError(f'maps of {x.shape[1]}x{x.shape[2]} are too small for a pool of {size}x{size}')
        stop = reach // stride * stride + 1
        shifted = [lax.slice_in_dim(padded, i, i + stop, stride, axis) for i in range(size)]
        x = reduce(jnp.maximum, shifted)
    return x


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """Averages maps [B, H, W, C] to [B, size, size, C], as torch's AdaptiveAvgPool2d.

    Cell i averages the pixels from floor(i H / size) to ceil((i + 1) H / size). So cells overlap, or repeat a pixel, if
    H is not a multiple of the size.
    """
    rows, columns = (averaging_matrix(length, size) for length in x.shape[1:3])
    averages = jnp.einsum('bhwc,ph,qw->bpqc', x.astype(jnp.float32), rows, columns, precision=lax.Precision.HIGHEST)
    return averages.astype(x.dtype)


def averaging_matrix(length: int, size: int) -> np.ndarray:
    """Computes the weights float32 [size, length] of `adaptive_average_pool` along one axis."""
    matrix = np.zeros((size, length), np.float32)
    for i in range(size):
        cell = slice(i * length // size, math.ceil((i + 1) * length / size))
        matrix[i, cell] = 1 / (cell.stop - cell.start)
    return matrix


def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...], dtype: Any) -> jax.Array:
    """Computes (images - mean) / std in `dtype`; mean and std have one value or one per channel."""
    channels = images.shape[-1]
    mean_array = jnp.broadcast_to(jnp.asarray(mean, jnp.float32), (channels,))
    std_array = jnp.broadcast_to(jnp.asarray(std, jnp.float32), (channels,))
    return ((images - mean_array[None, None, None, :]) / std_array[None, None, None, :]).astype(dtype)
