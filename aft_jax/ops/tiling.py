"""Batches cut into equal parts, whose intermediate results stay in a CPU's cache."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax


def nearest_divisor(number: int, wanted: float) -> int:
    """Returns the divisor of `number` whose ratio to `wanted` is nearest to 1."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / wanted)))


def cut(x: jax.Array, size: int) -> jax.Array:
    """Returns [parts, size, ...] of an array whose length `size` divides."""
    return x.reshape(-1, size, *x.shape[1:])


def summed(
    of_part: Callable[..., jax.Array], arrays: Sequence[jax.Array], size: int, shape: tuple[int, ...]
) -> jax.Array:
    """Returns the sum of what a function makes of each part of some arrays.

    Args:
        of_part: Of the parts of all arrays, [size, ...] each; gives the shape, in the dtype of the first.
        arrays: Of equal length.
        size: Of a part.
        shape: Of the sum.
    """
    if size == len(arrays[0]):
        return of_part(*arrays)
    start = jnp.zeros(shape, arrays[0].dtype)
    parts = tuple(cut(x, size) for x in arrays)
    return lax.scan(lambda total, part: (total + of_part(*part), None), start, parts)[0]
