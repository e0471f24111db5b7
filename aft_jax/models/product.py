"""The product of a dense layer, whose weights' gradient is fast on a CPU; everywhere else it is XLA's own.

For that gradient, x' g, XLA's CPU backend reads x across the grain in every sum. Turned beforehand it takes four fifths
of the time.
"""

from typing import Any

import jax
from jax import lax


def product(x: jax.Array, weights: jax.Array, dimension_numbers: Any, **plain: Any) -> jax.Array:
    """The product as `flax.linen.Dense` calls it.

    Args:
        x: [B, C].
        weights: [C, C'], of the same dtype.
        dimension_numbers: The last axis of the one, the first of the other.
        plain: What `flax.linen.Dense` adds: no precision, no preferred dtype.

    Returns:
        [B, C'], of the same dtype.

    Raises:
        ValueError: Another product.
    """
    unusual = {name: value for name, value in plain.items() if value is not None}
    if x.ndim != 2 or dimension_numbers != (((1,), (0,)), ((), ())) or unusual:
        raise ValueError(f'not a plain product: {x.shape}, {dimension_numbers}, {unusual}')
    return _product(x, weights)


@jax.custom_vjp
def _product(x: jax.Array, weights: jax.Array) -> jax.Array:
    return x @ weights


def _forward(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, Any]:
    return x @ weights, (x, weights)


def _backward(saved: Any, out: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weights = saved
    return out @ weights.T, lax.platform_dependent(x, out, cpu=turned_first, default=plain_gradient)


_product.defvjp(_forward, _backward)


def plain_gradient(x: jax.Array, out: jax.Array) -> jax.Array:
    """Returns the gradient of the weights [C, C'], given those of the product [B, C'] and x [B, C]."""
    return x.T @ out


def turned_first(x: jax.Array, out: jax.Array) -> jax.Array:
    """The same, as a CPU is to compute it."""
    return lax.optimization_barrier(x.T) @ out
