"""Operators that reduce axes, and products of matrices."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from aft_jax.interchange.torch_operators.registry import OPERATORS, Operator, operator
from aft_jax.interchange.torch_operators.values import LAST, Maps, axes_of, plain


def reduction(name: str, function: Callable[..., jax.Array]) -> None:
    """Registers a function of (array, axes, keepdims) under the name of an operator of (x, dim, keepdim)."""

    def call(x: Any, dim: int | Sequence[int] | None = None, keepdim: bool = False, **options: Any) -> Any:
        axes = axes_of(dim, x.ndim)
        # Without the axes that are reduced, both layouts must have the same order.
        if isinstance(x, Maps) and (keepdim or set(axes) in ({2, 3}, {1}, {1, 2, 3})):
            result = function(x.array, tuple(LAST[axis] for axis in axes), keepdim)
            return Maps(result) if keepdim else result
        return function(plain(x), axes, keepdim)

    OPERATORS[name] = Operator(call, takes_maps=True)


reduction('mean', lambda x, axes, keepdims: x.mean(axes, keepdims=keepdims))
reduction('sum', lambda x, axes, keepdims: x.sum(axes, keepdims=keepdims))
reduction('amax', lambda x, axes, keepdims: x.max(axes, keepdims=keepdims))
reduction('amin', lambda x, axes, keepdims: x.min(axes, keepdims=keepdims))


def _spread(root: bool, x: jax.Array, *arguments: Any, correction: int | None = 1, keepdim: bool = False) -> jax.Array:
    """Computes the variance or its root. The arguments are (unbiased), (dims, unbiased, keepdim) or (dims)."""
    dims, *rest = arguments if arguments and not isinstance(arguments[0], bool) else (None, *arguments)
    if rest:
        correction = int(rest[0])
        keepdim = bool(rest[1]) if len(rest) > 1 else keepdim
    ddof = 1 if correction is None else correction
    return (jnp.std if root else jnp.var)(x, axes_of(dims, x.ndim), ddof=ddof, keepdims=keepdim)


operator('var')(partial(_spread, False))
operator('std')(partial(_spread, True))


@operator('var_mean', 'std_mean')
def var_mean(x: jax.Array, *arguments: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    """Computes the variance and the mean."""
    keepdim = options.get('keepdim', arguments[2] if len(arguments) > 2 else False)
    dims = arguments[0] if arguments and not isinstance(arguments[0], bool) else None
    return _spread(False, x, *arguments, **options), x.mean(axes_of(dims, x.ndim), keepdims=keepdim)


@operator('max')
def largest(x: jax.Array, dim: int | jax.Array | None = None, keepdim: bool = False) -> Any:
    """Computes the maximum of all elements, or along an axis with its indices, or of two tensors."""
    if dim is None:
        return x.max()
    if not isinstance(dim, int):
        return jnp.maximum(x, dim)
    return x.max(dim, keepdims=keepdim), x.argmax(dim, keepdims=keepdim)


@operator('cumsum')
def cumsum(x: jax.Array, dim: int, *, dtype: int | None = None) -> jax.Array:
    """Sums from the first element of an axis to each."""
    return jnp.cumsum(x, dim)


@operator('linalg_vector_norm', 'norm')
def vector_norm(x: jax.Array, order: float = 2, dim: Any = None, keepdim: bool = False, **options: Any) -> jax.Array:
    """Computes the norm of vectors. Its gradient at 0 is 0, as in torch."""
    axes = axes_of(dim, x.ndim)
    if order != 2:
        return (jnp.abs(x) ** order).sum(axes, keepdims=keepdim) ** (1 / order)
    squares = jnp.square(x).sum(axes, keepdims=keepdim)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


@operator('softmax', '_softmax')
def softmax(x: jax.Array, dim: int, dtype: Any = None) -> jax.Array:
    """Computes the softmax along an axis."""
    return jax.nn.softmax(x, dim)


@operator('log_softmax', '_log_softmax')
def log_softmax(x: jax.Array, dim: int, dtype: Any = None) -> jax.Array:
    """Computes the logarithm of the softmax along an axis."""
    return jax.nn.log_softmax(x, dim)


@operator('matmul', 'mm', 'bmm', 'mv', 'dot')
def matmul(x: jax.Array, other: jax.Array) -> jax.Array:
    """Multiplies matrices or vectors; leading axes are broadcast."""
    ndim = max(x.ndim, other.ndim)
    if min(x.ndim, other.ndim) >= 2:
        x, other = (y.reshape((1,) * (ndim - y.ndim) + y.shape) for y in (x, other))
    return jnp.matmul(x, other)


@operator('addmm')
def addmm(bias: jax.Array, x: jax.Array, other: jax.Array, *, beta: float = 1, alpha: float = 1) -> jax.Array:
    """Computes beta bias + alpha x @ other."""
    product = x @ other
    return beta * jnp.broadcast_to(bias, product.shape) + alpha * product


@operator('einsum')
def einsum(equation: str, tensors: Sequence[jax.Array], **options: Any) -> jax.Array:
    """Computes a sum of products."""
    return jnp.einsum(equation, *tensors)


@operator('scaled_dot_product_attention')
def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> jax.Array:
    """Computes softmax(query key^T scale + mask) value. The dropout of a program in evaluation mode is 0."""
    scores = jnp.einsum('...qd,...kd->...qk', query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if mask is not None:
        mask = jnp.broadcast_to(mask.reshape((1,) * (scores.ndim - mask.ndim) + mask.shape), scores.shape)
        scores = jnp.where(mask, scores, -jnp.inf) if mask.dtype == jnp.bool_ else scores + mask
    return jnp.einsum('...qk,...kd->...qd', jax.nn.softmax(scores, -1), value)
