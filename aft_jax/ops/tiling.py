"""Batches split into equal parts, so that the intermediate results of a part stay in a CPU's cache.

Computing the whole batch at once gives the same result up to rounding, slower. Measured: see `ops.convolution` and
`ops.winograd`.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax


def nearest_divisor(number: int, target: float) -> int:
    """Finds the divisor of `number` whose ratio to `target` is nearest to 1."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / target)))


def split_parts(x: jax.Array, size: int) -> jax.Array:
    """Reshapes an array [parts * size, ...] to [parts, size, ...]."""
    return x.reshape(-1, size, *x.shape[1:])


def sum_over_parts(
    function: Callable[..., jax.Array], arrays: Sequence[jax.Array], size: int, shape: tuple[int, ...]
) -> jax.Array:
    """Sums the results of a function over the parts of a batch.

    Args:
        function: Function of one part [size, ...] of each array; returns an array of `shape` in the dtype of the first.
        arrays: Arrays of equal length.
        size: Length of a part.
        shape: Shape of the sum.
    """
    if size == len(arrays[0]):
        return function(*arrays)
    start = jnp.zeros(shape, arrays[0].dtype)
    parts = tuple(split_parts(x, size) for x in arrays)
    return lax.scan(lambda total, part: (total + function(*part), None), start, parts)[0]
