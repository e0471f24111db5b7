"""Operators with weights, as functions of arrays: convolution, dense layer, normalisations.

The layers of a program are modules of Flax (`aft_jax.interchange.torch_layers`). These functions serve weights that the
program computes, such as standardised kernels.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from aft_jax.interchange.torch_operators.pooling import Pair, pair
from aft_jax.interchange.torch_operators.registry import operator
from aft_jax.interchange.torch_operators.values import Maps, maps
from aft_jax.ops import convolution


def padding_of(padding: Any, sizes: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    """Computes the padding (before, after) of rows and columns from torch's numbers, 'same' or 'valid'."""
    if padding == 'valid':
        padding = 0
    if padding == 'same':
        totals = [d * (size - 1) for d, size in zip(dilation, sizes, strict=True)]
        return (totals[0] // 2, totals[0] - totals[0] // 2), (totals[1] // 2, totals[1] - totals[1] // 2)
    rows, columns = pair(padding)
    return (rows, rows), (columns, columns)


def convolve(
    x: jax.Array, kernel: jax.Array, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> jax.Array:
    """Convolves maps [B, H, W, C] with a kernel [h, w, C / groups, C'], by `aft_jax.ops` if that fits."""
    strides, dilations = pair(stride), pair(dilation)
    margins = padding_of(padding, (kernel.shape[0], kernel.shape[1]), dilations)
    if groups == 1 and dilations == (1, 1):
        return convolution.convolve(x, kernel, strides, margins)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        margins,
        rhs_dilation=dilations,
        dimension_numbers=convolution.LAYOUT,
        feature_group_count=groups,
    )


@operator('conv2d', takes_maps=True)
def conv2d(
    x: Any,
    weight: jax.Array,
    bias: jax.Array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Maps:
    """Convolves with a kernel in torch's layout [C', C / groups, h, w]."""
    x, weight = maps(x), weight.array if isinstance(weight, Maps) else weight.transpose(0, 2, 3, 1)
    y = convolve(x, weight.transpose(1, 2, 3, 0), stride, padding, dilation, groups)
    return Maps(y if bias is None else y + bias[None, None, None, :])


@operator('linear')
def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Computes x weight^T + bias."""
    y = x @ weight.T
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


@operator('layer_norm')
def layer_norm(
    x: jax.Array,
    shape: Sequence[int],
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    epsilon: float = 1e-5,
    cudnn_enabled: bool = True,
) -> jax.Array:
    """Normalises over the last axes."""
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    y = _standardised(x, axes, epsilon)
    wide = (1,) * (x.ndim - len(shape)) + tuple(shape)
    y = y if weight is None else y * weight.reshape(wide)
    return y if bias is None else y + bias.reshape(wide)


@operator('rms_norm')
def rms_norm(
    x: jax.Array, shape: Sequence[int], weight: jax.Array | None = None, epsilon: float | None = None
) -> jax.Array:
    """Divides by the root mean square over the last axes."""
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    epsilon = float(jnp.finfo(x.dtype).eps) if epsilon is None else epsilon
    y = x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + epsilon)
    return y if weight is None else y * weight.reshape((1,) * (x.ndim - len(shape)) + tuple(shape))


@operator('group_norm', takes_maps=True)
def group_norm(
    x: Any,
    groups: int,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    epsilon: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """Normalises over the positions and the channels of each group."""
    array = x.array if isinstance(x, Maps) else jnp.moveaxis(x, 1, -1)
    grouped = array.reshape(*array.shape[:-1], groups, -1)
    axes = (*range(1, array.ndim - 1), grouped.ndim - 1)
    y = _standardised(grouped, axes, epsilon).reshape(array.shape)
    wide = (1,) * (array.ndim - 1) + (-1,)
    y = y if weight is None else y * weight.reshape(wide)
    y = y if bias is None else y + bias.reshape(wide)
    return Maps(y) if isinstance(x, Maps) else jnp.moveaxis(y, -1, 1)


@operator('instance_norm', takes_maps=True)
def instance_norm(
    x: Any,
    weight: jax.Array | None,
    bias: jax.Array | None,
    running_mean: jax.Array | None,
    running_var: jax.Array | None,
    use_input_stats: bool,
    momentum: float,
    epsilon: float,
    cudnn_enabled: bool,
) -> Any:
    """Normalises each channel of each image over its positions."""
    if running_mean is not None:
        raise NotImplementedError('running statistics')
    return group_norm(x, x.shape[1], weight, bias, epsilon)


def _standardised(x: jax.Array, axes: tuple[int, ...], epsilon: float) -> jax.Array:
    """Subtracts the mean and divides by the deviation, in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axes, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + epsilon)).astype(x.dtype)
