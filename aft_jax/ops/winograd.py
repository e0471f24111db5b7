"""Winograd convolutions, 3x3 with stride 1, for CPUs: a quarter of the multiplications.

XLA's own operation gives the same result up to float32 rounding, slower. Measured: with 32 channels this one is
1.5 times as fast (docs/benchmarks.md).

Each tile of 4x4 output pixels is computed from the 6x6 input pixels under it as a product of polynomials. Both factors
are evaluated at six points (36 in two dimensions), multiplied there, and summed over the channels. Then the product is
interpolated. The sums over channels are 36 matrix products. The remaining additions cost little if there are many
channels. A few images are computed at a time, so that intermediate results stay in the cache.

The points are 0, +-sqrt(1/2), +-sqrt(2) and infinity. The usual points, 0, +-1, +-2 and infinity, double the rounding
error. With these points the error is twice that of the plain sum: for float32 and 64 channels, 8e-7 against 4e-7 of the
root mean square of the result.

Source: Winograd, "Arithmetic Complexity of Computations" (1980); Lavin & Gray, "Fast Algorithms for Convolutional
Neural Networks" (2016); the choice of points for accuracy: Barabasz et al., "Error Analysis and Improving the
Accuracy of Winograd Convolution for Deep Neural Networks" (2018).
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from aft_jax.ops.tiling import nearest_divisor, split_parts, sum_over_parts

KERNEL = 3
TILE = 4
POINTS = (0.0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2.0), -math.sqrt(2.0))
REACH = TILE + KERNEL - 1
# Size of the evaluated pixels of the images that are computed at a time. Measured: 2 to 5 MB are equally fast.
PART_BYTES = 4_000_000
Pairs = tuple[tuple[int, int], tuple[int, int]]


def matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes float64 A [REACH, TILE], G [REACH, KERNEL] and B [REACH, REACH] with out = A^T ((G kernel) (B pixels)).

    This is the convolution in one dimension: out[i] = sum_k kernel[k] pixels[i + k], for TILE outputs.
    """
    points = np.array(POINTS)
    powers = points[:, None] ** np.arange(TILE)
    a = np.vstack([powers, np.eye(TILE)[-1]])
    others = [np.delete(points, i) for i in range(len(points))]
    weights = np.array([np.prod(p - rest) for p, rest in zip(points, others, strict=True)])
    g = np.vstack([points[:, None] ** np.arange(KERNEL) / weights[:, None], np.eye(KERNEL)[-1]])
    b = np.zeros((REACH, REACH))
    for i, rest in enumerate(others):
        b[i, : REACH - 1] = np.poly(rest)[::-1]
    b[-1] = np.poly(points)[::-1]
    b[np.abs(b) < 1e-9] = 0.0  # zero except for rounding
    return a, g, b


A, G, B = matrices()


def convolve(x: jax.Array, kernel: jax.Array, padding: Pairs) -> jax.Array:
    """Computes the convolution with stride 1.

    Args:
        x: float32 [B, H, W, C].
        kernel: float32 [3, 3, C, C'].
        padding: Rows and columns of zeros (before, after), 0 to 2 of each.

    Returns:
        float32 [B, H', W', C'].
    """
    height, width = (n + sum(pair) - KERNEL + 1 for n, pair in zip(x.shape[1:3], padding, strict=True))
    tiles = _tiles(height, width)
    evaluated = _both_ways(G, list(kernel), lambda rows, j: rows[:, j]).reshape(-1, *kernel.shape[2:])

    def convolve_part(part: jax.Array) -> jax.Array:
        products = jnp.einsum('knc,kcd->knd', _pixels(part, padding, tiles), evaluated)
        products = products.reshape(REACH, REACH, -1, *tiles, products.shape[-1])
        # [row in the tile, column in the tile, B, rows of tiles, columns of tiles, C']
        out = _both_ways(A.T, list(products), lambda columns, i: columns[:, i])
        out = out.transpose(2, 3, 0, 4, 1, 5).reshape(-1, TILE * tiles[0], TILE * tiles[1], out.shape[-1])
        return out[:, :height, :width]

    out = lax.map(convolve_part, split_parts(x, _images_per_part(x, tiles)))
    return out.reshape(len(x), height, width, -1)


def input_gradient(out: jax.Array, kernel: jax.Array, padding: Pairs) -> jax.Array:
    """Computes the gradient with respect to the input of `convolve`, float32 [B, H, W, C].

    Args:
        out: float32 [B, H', W', C'], the gradient with respect to the output.
        kernel: float32 [3, 3, C, C'], the kernel of the convolution.
        padding: Padding of the convolution.
    """
    (top, bottom), (left, right) = padding
    opposite = ((2 - top, 2 - bottom), (2 - left, 2 - right))
    # The loop makes XLA transpose the kernel first. Otherwise each sum of the evaluation reads it with large strides.
    turned = lax.map(jnp.transpose, kernel.reshape(-1, *kernel.shape[2:])).reshape(
        *kernel.shape[:2], *kernel.shape[:1:-1]
    )
    return convolve(out, turned[::-1, ::-1], opposite)


def kernel_gradient(x: jax.Array, out: jax.Array, padding: Pairs) -> jax.Array:
    """Computes the gradient with respect to the kernel of `convolve`, float32 [3, 3, C, C'].

    Args:
        x: float32 [B, H, W, C], the input of the convolution.
        out: float32 [B, H', W', C'], the gradient with respect to the output.
        padding: Padding of the convolution.
    """
    tiles = _tiles(*out.shape[1:3])
    margins = [(0, TILE * count - size) for count, size in zip(tiles, out.shape[1:3], strict=True)]

    def gradient_of_part(x: jax.Array, out: jax.Array) -> jax.Array:
        gradients = _evaluate(A, jnp.pad(out, ((0, 0), *margins, (0, 0))), tiles)
        return jnp.einsum('knc,knd->kcd', _pixels(x, padding, tiles), gradients)

    shape = (REACH * REACH, x.shape[-1], out.shape[-1])
    total = sum_over_parts(gradient_of_part, (x, out), _images_per_part(x, tiles), shape)
    total = total.reshape(REACH, REACH, *total.shape[1:])
    return _both_ways(G.T, list(total), lambda columns, i: columns[:, i])


def _tiles(height: int, width: int) -> tuple[int, int]:
    """Computes the numbers of rows and columns of tiles that cover an output."""
    return -(-height // TILE), -(-width // TILE)


def _images_per_part(x: jax.Array, tiles: tuple[int, int]) -> int:
    """Computes the number of images that are computed at a time."""
    image = REACH * REACH * math.prod(tiles) * x.shape[-1] * x.dtype.itemsize
    return nearest_divisor(len(x), PART_BYTES / image)


def _pixels(x: jax.Array, padding: Pairs, tiles: tuple[int, int]) -> jax.Array:
    """Evaluates the input at the points: [REACH * REACH, tiles of all images, C]."""
    margins = [
        (before, TILE * count + KERNEL - 1 - before - size)
        for (before, _), count, size in zip(padding, tiles, x.shape[1:3], strict=True)
    ]
    return _evaluate(B, jnp.pad(x, ((0, 0), *margins, (0, 0))), tiles)


def _evaluate(matrix: np.ndarray, maps: jax.Array, tiles: tuple[int, int]) -> jax.Array:
    """Evaluates maps [B, H, W, C] tile by tile in both directions: [REACH * REACH, B * tiles, C].

    The matrix [REACH, n] is applied to the first n pixels of each tile.
    """
    rows, columns = (TILE * (count - 1) + 1 for count in tiles)
    views = [maps[:, i : i + rows : TILE] for i in range(matrix.shape[1])]
    evaluated = _both_ways(matrix, views, lambda down, j: down[:, :, :, j : j + columns : TILE])
    return evaluated.reshape(REACH * REACH, -1, maps.shape[-1])


def _both_ways(
    matrix: np.ndarray, views: Sequence[jax.Array], other: Callable[[jax.Array, int], jax.Array]
) -> jax.Array:
    """Applies a matrix [m, n] in one direction and then, to the result, in the other.

    Args:
        matrix: Matrix of one dimension.
        views: The n arrays of the first direction, of equal shape.
        other: Function of the result [m, ...] of the first direction and i, which returns the i-th of the n arrays of
            the second direction.

    Returns:
        [m (second direction), m (first), ...].
    """
    first = _combine(matrix, views)
    return _combine(matrix, [other(first, i) for i in range(matrix.shape[1])])


def _combine(matrix: np.ndarray, views: Sequence[jax.Array]) -> jax.Array:
    """Computes the sums of n arrays, weighted by each of the m rows of the matrix; zero weights are skipped."""
    sums = [[float(weight) * view for weight, view in zip(row, views, strict=True) if weight] for row in matrix]
    return jnp.stack([reduce(jnp.add, terms) for terms in sums])
