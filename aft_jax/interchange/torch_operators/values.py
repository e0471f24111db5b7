"""Values of a PyTorch graph in JAX: plain arrays with torch's axes, and feature maps with the channels last.

torch's feature maps are [B, C, H, W], and the fast operations of `aft_jax.ops` take [B, H, W, C]. So feature maps stay
in the second layout as long as the operators allow it, and an operator sees which layout it gets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

# Axis of torch's [B, C, H, W] -> axis of [B, H, W, C].
LAST = (0, 3, 1, 2)


@dataclass(frozen=True)
class Maps:
    """Feature maps, torch's [B, C, H, W], stored as [B, H, W, C].

    Attributes:
        array: [B, H, W, C].
    """

    array: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in torch, (B, C, H, W)."""
        batch, height, width, channels = self.array.shape
        return batch, channels, height, width

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return 4

    @property
    def dtype(self) -> Any:
        """Dtype of the array."""
        return self.array.dtype


Value = jax.Array | Maps


def plain(value: Any) -> Any:
    """Converts feature maps to an array [B, C, H, W]; other values stay as they are."""
    return value.array.transpose(0, 3, 1, 2) if isinstance(value, Maps) else value


def maps(value: Any) -> jax.Array:
    """Converts feature maps in either layout to an array [B, H, W, C]."""
    return value.array if isinstance(value, Maps) else value.transpose(0, 2, 3, 1)


def axes_of(dims: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """Converts torch's argument `dim` to axes from 0; None and () mean all axes."""
    if dims is None or dims == () or dims == []:
        return tuple(range(ndim))
    return tuple(dim % ndim for dim in (dims if isinstance(dims, Sequence) else (dims,)))


def aligned(values: Sequence[Any]) -> tuple[list[Any], bool]:
    """Gives the arguments of an elementwise operator one layout, one number of axes and one dtype.

    Args:
        values: Arrays, `Maps` and Python numbers.

    Returns:
        Arrays and Python numbers, and whether the result is `Maps`.
    """
    ndim = max((value.ndim for value in values if _is_tensor(value)), default=0)
    as_maps = ndim == 4 and any(isinstance(value, Maps) for value in values)
    results = []
    for value in values:
        if _is_tensor(value):
            value = value if isinstance(value, Maps) and as_maps else plain(value)
            if not isinstance(value, Maps) and value.ndim < ndim:
                value = value.reshape((1,) * (ndim - value.ndim) + value.shape)
            value = maps(value) if as_maps else value
        results.append(value)
    return _promoted(results), as_maps


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Maps | jax.Array) or hasattr(value, 'ndim')


def _promoted(values: Sequence[Any]) -> list[Any]:
    """Converts arrays to torch's common dtype: floating-point numbers before integers before booleans."""
    dtypes = [value.dtype for value in values if hasattr(value, 'dtype')]
    if not dtypes:
        return list(values)
    with jax.numpy_dtype_promotion('standard'):
        dtype = jnp.result_type(*dtypes)
    if any(isinstance(value, float) for value in values) and not jnp.issubdtype(dtype, jnp.floating):
        dtype = jnp.dtype(jnp.float32)
    elif dtype == jnp.bool_ and any(isinstance(value, int) and not isinstance(value, bool) for value in values):
        dtype = jnp.dtype(jnp.int32)
    return [value.astype(dtype) if hasattr(value, 'dtype') else value for value in values]
