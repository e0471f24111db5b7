"""Operators that move elements: reshaping, transposing, slicing, joining."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from aft_jax.interchange.torch_operators.registry import operator
from aft_jax.interchange.torch_operators.values import LAST, Maps, maps, plain

# torch's `end` of a slice to the last element.
NO_END = 2**63 - 1


@operator('sym_size', takes_maps=True)
def size(x: Any, dim: int) -> int:
    """Returns the length of an axis."""
    return x.shape[dim]


@operator('sym_numel', 'numel', takes_maps=True)
def numel(x: Any) -> int:
    """Computes the number of elements."""
    total = 1
    for length in x.shape:
        total *= length
    return total


@operator('getitem', takes_maps=True)
def getitem(values: Sequence[Any], index: int) -> Any:
    """Takes one result of an operator with several."""
    return values[index]


@operator('view', 'reshape', '_unsafe_view', takes_maps=True)
def reshape(x: Any, shape: Sequence[int]) -> Any:
    """Reshapes; feature maps are laid out as torch's first, unless the shape stays."""
    if isinstance(x, Maps):
        known = [s if s != -1 else None for s in shape]
        if len(shape) == 4 and all(s in (None, old) for s, old in zip(known, x.shape, strict=True)):
            return x
    return plain(x).reshape(tuple(shape))


@operator('flatten')
def flatten(x: jax.Array, start: int = 0, end: int = -1) -> jax.Array:
    """Joins the axes from start to end."""
    start, end = start % x.ndim, end % x.ndim
    return x.reshape(*x.shape[:start], -1, *x.shape[end + 1 :])


@operator('unflatten')
def unflatten(x: jax.Array, dim: int, sizes: Sequence[int]) -> jax.Array:
    """Splits an axis."""
    dim %= x.ndim
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


@operator('permute', takes_maps=True)
def permute(x: Any, dims: Sequence[int]) -> Any:
    """Permutes axes. Between torch's two layouts of feature maps nothing is moved."""
    dims = tuple(dim % x.ndim for dim in dims)
    if isinstance(x, Maps):
        return x.array.transpose(*(LAST[dim] for dim in dims))
    return Maps(x) if dims == LAST else x.transpose(*dims)


@operator('transpose', 'swapaxes', 'swapdims')
def transpose(x: jax.Array, first: int, second: int) -> jax.Array:
    """Exchanges two axes."""
    return jnp.swapaxes(x, first, second)


@operator('t', 'numpy_T')
def t(x: jax.Array) -> jax.Array:
    """Transposes a matrix."""
    return x.T


@operator('movedim')
def movedim(x: jax.Array, source: Any, destination: Any) -> jax.Array:
    """Moves axes."""
    return jnp.moveaxis(x, source, destination)


@operator('unsqueeze')
def unsqueeze(x: jax.Array, dim: int) -> jax.Array:
    """Adds an axis of length 1."""
    return jnp.expand_dims(x, dim)


@operator('squeeze')
def squeeze(x: jax.Array, dims: int | Sequence[int] | None = None) -> jax.Array:
    """Removes axes of length 1; other named axes stay, as in torch."""
    named = range(x.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    return jnp.squeeze(x, tuple(dim % x.ndim for dim in named if x.shape[dim] == 1))


@operator('expand')
def expand(x: jax.Array, shape: Sequence[int], *, implicit: bool = False) -> jax.Array:
    """Repeats axes of length 1; -1 keeps a length."""
    old = (1,) * (len(shape) - x.ndim) + x.shape
    return jnp.broadcast_to(x.reshape(old), tuple(o if n == -1 else n for n, o in zip(shape, old, strict=True)))


@operator('expand_as')
def expand_as(x: jax.Array, other: jax.Array) -> jax.Array:
    """Repeats axes of length 1 to the shape of another tensor."""
    return expand(x, other.shape)


@operator('repeat')
def repeat(x: jax.Array, repeats: Sequence[int]) -> jax.Array:
    """Repeats the whole tensor along each axis."""
    return jnp.tile(x, repeats)


@operator('cat', 'concat', 'concatenate', takes_maps=True)
def cat(tensors: Sequence[Any], dim: int = 0) -> Any:
    """Joins tensors along an axis."""
    if tensors[0].ndim == 4 and any(isinstance(x, Maps) for x in tensors):
        return Maps(jnp.concatenate([maps(x) for x in tensors], LAST[dim]))
    return jnp.concatenate([plain(x) for x in tensors], dim)


@operator('stack')
def stack(tensors: Sequence[jax.Array], dim: int = 0) -> jax.Array:
    """Joins tensors along a new axis."""
    return jnp.stack(tensors, dim)


def _along(x: Any, dim: int) -> tuple[jax.Array, int, Any]:
    """Returns the array, its axis for torch's `dim`, and the class of results of the same layout."""
    return (x.array, LAST[dim], Maps) if isinstance(x, Maps) else (x, dim % x.ndim, lambda array: array)


@operator('split', 'split_with_sizes', takes_maps=True)
def split(x: Any, sizes: int | Sequence[int], dim: int = 0) -> tuple[Any, ...]:
    """Splits into parts of one size, or of the given sizes."""
    array, axis, kind = _along(x, dim)
    if isinstance(sizes, int):
        bounds = list(range(sizes, array.shape[axis], sizes))
    else:
        bounds = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return tuple(map(kind, jnp.split(array, bounds, axis)))


@operator('chunk', takes_maps=True)
def chunk(x: Any, chunks: int, dim: int = 0) -> tuple[Any, ...]:
    """Splits into at most `chunks` parts of equal size; the last one may be smaller."""
    return split(x, -(-x.shape[dim] // chunks), dim)


@operator('unbind')
def unbind(x: jax.Array, dim: int = 0) -> tuple[jax.Array, ...]:
    """Splits into slices without the axis."""
    return tuple(jnp.moveaxis(x, dim, 0))


@operator('select')
def select(x: jax.Array, dim: int, index: int) -> jax.Array:
    """Takes one slice without the axis."""
    dim %= x.ndim
    return jax.lax.index_in_dim(x, index % x.shape[dim], dim, keepdims=False)


@operator('slice', takes_maps=True)
def slice_axis(x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    """Takes a range of an axis."""
    array, axis, kind = _along(x, dim)
    bounds = slice(start, None if end is None or end >= NO_END else end).indices(array.shape[axis])
    return kind(jax.lax.slice_in_dim(array, bounds[0], max(bounds[:2]), step, axis))


@operator('slice_scatter')
def slice_scatter(
    x: jax.Array, part: jax.Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> jax.Array:
    """Writes a range of an axis."""
    place = [slice(None)] * x.ndim
    place[dim] = slice(start, None if end is None or end >= NO_END else end, step)
    return x.at[tuple(place)].set(part)


@operator('select_scatter')
def select_scatter(x: jax.Array, part: jax.Array, dim: int, index: int) -> jax.Array:
    """Writes one slice of an axis."""
    place: list[Any] = [slice(None)] * x.ndim
    place[dim] = index
    return x.at[tuple(place)].set(part)


@operator('narrow')
def narrow(x: jax.Array, dim: int, start: int, length: int) -> jax.Array:
    """Takes a range of an axis by its start and length."""
    return slice_axis(x, dim, start, start + length)


@operator('index')
def index(x: jax.Array, indices: Sequence[jax.Array | None]) -> jax.Array:
    """Indexes with integer arrays; None takes a whole axis."""
    return x[tuple(slice(None) if entry is None else entry for entry in indices)]


@operator('index_select')
def index_select(x: jax.Array, dim: int, indices: jax.Array) -> jax.Array:
    """Takes slices by their numbers."""
    return jnp.take(x, indices, dim)


@operator('gather')
def gather(x: jax.Array, dim: int, indices: jax.Array) -> jax.Array:
    """Takes elements by their numbers along an axis."""
    return jnp.take_along_axis(x, indices, dim)


@operator('roll')
def roll(x: jax.Array, shifts: Sequence[int], dims: Sequence[int] = ()) -> jax.Array:
    """Rotates along axes."""
    return jnp.roll(x, shifts, dims) if dims else jnp.roll(x, shifts)


@operator('flip')
def flip(x: jax.Array, dims: Sequence[int]) -> jax.Array:
    """Reverses axes."""
    return jnp.flip(x, dims)


@operator('pad', 'constant_pad_nd')
def pad(x: jax.Array, widths: Sequence[int], mode: Any = 'constant', value: float | None = None) -> jax.Array:
    """Pads the last axes; `widths` holds (before, after) from the last axis backwards. Negative widths crop."""
    if not isinstance(mode, str):  # constant_pad_nd has no mode
        mode, value = 'constant', mode
    pairs = [(0, 0)] * (x.ndim - len(widths) // 2)
    pairs += [(widths[i], widths[i + 1]) for i in range(len(widths) - 2, -1, -2)]
    if mode == 'constant':
        filling = jnp.asarray(value or 0, x.dtype)
        return jax.lax.pad(x, filling, [(before, after, 0) for before, after in pairs])
    return jnp.pad(x, pairs, {'reflect': 'reflect', 'replicate': 'edge', 'circular': 'wrap'}[mode])


@operator('pixel_shuffle')
def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """Moves channels to pixels: [B, C r r, H, W] -> [B, C, H r, W r]."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels // factor**2, factor, factor, height, width)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, -1, height * factor, width * factor)


@operator('pixel_unshuffle')
def pixel_unshuffle(x: jax.Array, factor: int) -> jax.Array:
    """Moves pixels to channels: [B, C, H r, W r] -> [B, C r r, H, W]."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // factor, factor, width // factor, factor)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, height // factor, width // factor)


@operator('channel_shuffle')
def channel_shuffle(x: jax.Array, groups: int) -> jax.Array:
    """Interleaves the channels of groups."""
    batch, channels, *sides = x.shape
    return x.reshape(batch, groups, channels // groups, *sides).swapaxes(1, 2).reshape(x.shape)
