"""Operators that pool or resize feature maps."""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aft_jax.interchange.torch_operators.registry import operator
from aft_jax.interchange.torch_operators.values import Maps, maps
from aft_jax.models.layers import averaging_matrix

Pair = tuple[int, int]


def pair(value: int | Sequence[int]) -> Pair:
    """Converts torch's one or two numbers for rows and columns to two."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values[0], values[-1]


@operator('max_pool2d', takes_maps=True)
def max_pool(x: Any, size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False) -> Maps:
    """Computes the maximum of each window, as pairwise maxima (see `models.layers.max_pool`)."""
    array = maps(x)
    sizes, strides, margins, dilations = pair(size), pair(stride or size), pair(padding), pair(dilation)
    for axis in (0, 1):
        reach = dilations[axis] * (sizes[axis] - 1) + 1
        count, after = windows(array.shape[1 + axis], reach, strides[axis], margins[axis], ceil_mode)
        widths = [(0, 0, 0)] * 4
        widths[1 + axis] = (margins[axis], after, 0)
        padded = jax.lax.pad(array, jnp.asarray(-jnp.inf, array.dtype), widths)
        stop = (count - 1) * strides[axis] + 1
        starts = [i * dilations[axis] for i in range(sizes[axis])]
        views = [jax.lax.slice_in_dim(padded, i, i + stop, strides[axis], 1 + axis) for i in starts]
        array = reduce(jnp.maximum, views)
    return Maps(array)


@operator('max_pool2d_with_indices', takes_maps=True)
def max_pool_with_indices(x: Any, *arguments: Any) -> tuple[Maps, None]:
    """Computes the maximum of each window; the indices do not exist here."""
    return max_pool(x, *arguments), None


def windows(length: int, reach: int, stride: int, margin: int, ceil_mode: bool) -> Pair:
    """Computes the number of windows along an axis, and the padding after it (negative if pixels are left over).

    Args:
        length: Length of the axis in pixels.
        reach: Length of a window.
        stride: Distance between windows.
        margin: Padding on both sides.
        ceil_mode: Whether a last window may begin in the axis and reach beyond its padding.
    """
    room = length + 2 * margin - reach
    if room < 0 and not ceil_mode:
        raise ValueError(f'maps of {length} pixels are too small for windows of {reach}')
    count = (math.ceil(room / stride) if ceil_mode else room // stride) + 1
    if ceil_mode and (count - 1) * stride >= length + margin:
        count -= 1
    return count, (count - 1) * stride + reach - length - margin


@operator('avg_pool2d', takes_maps=True)
def average_pool(
    x: Any,
    size: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Maps:
    """Averages each window. Padding counts as zeros, or not at all."""
    array = maps(x)
    matrices = []
    for axis in (0, 1):
        length, reach, step, margin = (
            array.shape[1 + axis],
            pair(size)[axis],
            pair(stride or size)[axis],
            pair(padding)[axis],
        )
        count, _ = windows(length, reach, step, margin, ceil_mode)
        matrix = np.zeros((count, length), np.float32)
        for i in range(count):
            start = i * step - margin
            stop = min(start + reach, length + margin)
            inside = slice(max(start, 0), min(stop, length))
            number = stop - start if count_include_pad else max(inside.stop - inside.start, 1)
            matrix[i, inside] = 1 if divisor else 1 / number
        matrices.append(matrix)
    if divisor:
        matrices[0] /= divisor
    return Maps(weighted(array, *matrices))


@operator('adaptive_avg_pool2d', takes_maps=True)
def adaptive_average_pool(x: Any, size: Any) -> Maps:
    """Averages to maps of a fixed size; None keeps a side."""
    array = maps(x)
    sizes = [length if target is None else target for target, length in zip(pair(size), array.shape[1:3], strict=True)]
    if sizes == [1, 1]:
        return Maps(array.mean((1, 2), keepdims=True))
    return Maps(
        weighted(array, *(averaging_matrix(length, n) for length, n in zip(array.shape[1:3], sizes, strict=True)))
    )


@operator('adaptive_max_pool2d', takes_maps=True)
def adaptive_max_pool(x: Any, size: Any) -> tuple[Maps, None]:
    """Computes maxima for maps of a fixed size; the indices do not exist here."""
    array = maps(x)
    for axis in (1, 2):
        length, n = array.shape[axis], pair(size)[axis - 1]
        cells = [slice(i * length // n, math.ceil((i + 1) * length / n)) for i in range(n)]
        parts = [jax.lax.slice_in_dim(array, c.start, c.stop, 1, axis).max(axis, keepdims=True) for c in cells]
        array = jnp.concatenate(parts, axis)
    return Maps(array), None


def weighted(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """Computes weighted sums of the rows and of the columns of maps [B, H, W, C] in float32."""
    sums = jnp.einsum('bhwc,ph,qw->bpqc', x.astype(jnp.float32), rows, columns, precision=jax.lax.Precision.HIGHEST)
    return sums.astype(x.dtype)


@operator('upsample_nearest2d', takes_maps=True)
def nearest(x: Any, size: Any, *scales: Any) -> Maps:
    """Resizes by repeating the nearest pixel before."""
    array = maps(x)
    for axis, (n, _) in enumerate(_sizes(array, size, scales), start=1):
        array = jnp.take(array, np.arange(n) * array.shape[axis] // n, axis)
    return Maps(array)


@operator('upsample_bilinear2d', takes_maps=True)
def bilinear(x: Any, size: Any, align_corners: bool, *scales: Any) -> Maps:
    """Resizes bilinearly; positions are those of torch with or without `align_corners`."""
    array = maps(x)
    matrices = []
    for axis, (n, scale) in enumerate(_sizes(array, size, scales), start=1):
        length = array.shape[axis]
        if align_corners:
            positions = np.arange(n) * ((length - 1) / (n - 1) if n > 1 else 0.0)
        else:
            positions = np.maximum((np.arange(n) + 0.5) / (scale or n / length) - 0.5, 0)
        low = np.minimum(positions.astype(int), length - 1)
        matrix = np.zeros((n, length), np.float32)
        np.add.at(matrix, (np.arange(n), low), 1 - (positions - low))
        np.add.at(matrix, (np.arange(n), np.minimum(low + 1, length - 1)), positions - low)
        matrices.append(matrix)
    return Maps(weighted(array, *matrices))


def _sizes(x: jax.Array, size: Any, scales: Sequence[Any]) -> list[tuple[int, float | None]]:
    """Computes the new sides, and the factors if they are given, from either argument list of torch."""
    given = [scale for entry in scales for scale in (entry if isinstance(entry, tuple) else (entry,))] or [None, None]
    if size is not None:
        return list(zip(pair(size), given, strict=True))
    return [(math.floor(length * scale), scale) for length, scale in zip(x.shape[1:3], given, strict=True)]
