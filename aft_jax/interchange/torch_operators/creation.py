"""Operators that create tensors or convert their dtype."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from aft_jax.interchange.torch_operators.registry import operator
from aft_jax.interchange.torch_operators.values import Maps

# Numbers of torch's dtypes in a graph; JAX computes 64-bit numbers in 32 bits.
DTYPES = {
    1: jnp.uint8,
    2: jnp.int8,
    3: jnp.int16,
    4: jnp.int32,
    5: jnp.int32,
    6: jnp.float16,
    7: jnp.float32,
    8: jnp.float32,
    12: jnp.bool_,
    13: jnp.bfloat16,
}


@operator('to', '_to_copy', takes_maps=True)
def convert(x: Any, *arguments: Any, dtype: int | None = None, **options: Any) -> Any:
    """Converts to a dtype, if the arguments name one; devices and memory formats have no meaning here."""
    numbers = [a for a in arguments if isinstance(a, int) and not isinstance(a, bool)]
    dtype = dtype if dtype is not None else next(iter(numbers), None)
    if dtype is None:
        return x
    return Maps(x.array.astype(DTYPES[dtype])) if isinstance(x, Maps) else x.astype(DTYPES[dtype])


@operator('type_as', takes_maps=True)
def type_as(x: Any, other: Any) -> Any:
    """Converts to the dtype of another tensor."""
    return Maps(x.array.astype(other.dtype)) if isinstance(x, Maps) else x.astype(other.dtype)


@operator(
    'contiguous',
    'clone',
    'detach',
    'detach_',
    'alias',
    'lift_fresh_copy',
    'identity',
    'item',
    'lift_fresh',
    takes_maps=True,
)
def same(x: Any, *arguments: Any, **options: Any) -> Any:
    """Returns its first argument: copies and memory formats have no meaning here."""
    return x


def full(shape: Sequence[int], *arguments: Any, value: int | None = None, dtype: int | None = None, **options: Any):
    """Creates a tensor of one value, which is the first further argument unless `value` is given."""
    filled = arguments[0] if value is None else value
    default = jnp.float32 if value is not None or isinstance(filled, float) else jnp.int32
    return jnp.full(shape, filled, DTYPES[dtype] if dtype is not None else default)


def full_like(x: jax.Array, *arguments: Any, value: int | None = None, dtype: int | None = None, **options: Any):
    """Creates a tensor of one value in the shape of another."""
    return new_full(x, x.shape, *arguments, value=value, dtype=dtype)


def new_full(
    x: jax.Array,
    shape: Sequence[int],
    *arguments: Any,
    value: int | None = None,
    dtype: int | None = None,
    **options: Any,
) -> jax.Array:
    """Creates a tensor of one value in the dtype of another."""
    filled = arguments[0] if value is None else value
    return jnp.full(shape, filled, DTYPES[dtype] if dtype is not None else x.dtype)


for _kind, _value in (('zeros', 0), ('ones', 1), ('full', None)):
    operator(_kind)(partial(full, value=_value))
    operator(f'{_kind}_like')(partial(full_like, value=_value))
    operator(f'new_{_kind}')(partial(new_full, value=_value))


@operator('arange')
def arange(*bounds: Any, dtype: int | None = None, **options: Any) -> jax.Array:
    """Counts from the first bound to the last."""
    values = jnp.arange(*bounds)
    return values if dtype is None else values.astype(DTYPES[dtype])
