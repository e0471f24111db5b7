"""A convolution that is fast on a CPU, together with its gradients; on other devices it is XLA's own.

XLA's own operation gives the same result up to float32 rounding, slower. On a CPU, a 3x3 convolution of stride 1 in
float32 with at least WIDE channels uses `ops.winograd`. A first layer or a shortcut is one matrix product. The other
convolutions avoid two weaknesses of XLA's CPU backend:

- For the gradient of the kernel XLA gathers the patches of the whole batch before it multiplies them. For 128 images of
  32x32x64 these are 300 MB, and the gradient takes ten times as long as the convolution. Here a loop sums over parts of
  a few images, whose patches stay in the cache.
- Inside a loop XLA is fast only for convolutions in the layout NHWC, HWIO, which its own gradients do not have
  (https://github.com/jax-ml/jax/issues/12868). Here both gradients are convolutions in this layout.

With several (virtual) CPU devices the plain operations are used, because each device already has only a part of the
batch.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from aft_jax.ops import winograd
from aft_jax.ops.tiling import nearest_divisor, sum_over_parts

# Size of the patches of one part of the batch. Measured: 2 to 8 MB are equally fast, 16 MB is slower.
PATCH_BYTES = 2_000_000
# Below 32 output channels, parts of fewer images are up to ten times as slow, whatever their size.
FEW_CHANNELS, FEWEST_IMAGES = 32, 8
# Measured: winograd is 1.5 times as fast with 32 channels, equally fast with 16, and often slower with 8 or 3.
WIDE = 32
LAYOUT = ('NHWC', 'HWIO', 'NHWC')
Pairs = tuple[tuple[int, int], tuple[int, int]]


def convolve(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]], **plain: Any
) -> jax.Array:
    """Computes a convolution; the signature is that which `flax.linen.Conv` calls.

    Args:
        x: [B, H, W, C].
        kernel: [h, w, C, C'], of the same dtype.
        strides: Strides of rows and columns.
        padding: Rows and columns of zeros (before, after).
        plain: Other arguments of `flax.linen.Conv`: no dilation, one group, no preferred dtype.

    Returns:
        [B, H', W', C'], of the same dtype.

    Raises:
        ValueError: If the convolution is dilated or grouped.
    """
    options = {name: value for name, value in plain.items() if name != 'dimension_numbers'}
    unusual = {name: value for name, value in options.items() if value not in (None, 1, (1, 1), [1, 1])}
    if unusual:
        raise ValueError(f'not a plain convolution: {unusual}')
    (top, bottom), (left, right) = padding
    return _convolve(x, kernel, (strides[0], strides[1]), ((top, bottom), (left, right)))


def plain(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Pairs) -> jax.Array:
    """Computes XLA's convolution, with XLA's gradients."""
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)


def cpu_convolution(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Pairs) -> jax.Array:
    """Computes the same convolution in the way that is fastest on a CPU."""
    if _suits_winograd(x, kernel, strides, padding):
        return winograd.convolve(x, kernel, padding)
    if math.prod(kernel.shape[:3]) <= kernel.shape[3]:
        return _by_patches(x, kernel, strides, padding)
    return plain(x, kernel, strides, padding)


def _by_patches(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Pairs) -> jax.Array:
    """Computes a convolution as one matrix product, for layers whose patches are no larger than their output."""
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = ((padded.shape[1 + axis] - kernel.shape[axis]) // strides[axis] for axis in (0, 1))
    views = [
        padded[:, i : i + rows * strides[0] + 1 : strides[0], j : j + columns * strides[1] + 1 : strides[1]]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    return jnp.concatenate(views, axis=-1) @ kernel.reshape(-1, kernel.shape[3])


def _suits_winograd(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Pairs) -> bool:
    return (
        kernel.shape[:2] == (winograd.KERNEL, winograd.KERNEL)
        and strides == (1, 1)
        and min(kernel.shape[2:]) >= WIDE
        and x.dtype == jnp.float32
        and all(0 <= margin < winograd.KERNEL for pair in padding for margin in pair)
    )


def _by_platform(cpu: Callable, usual: Callable, *arrays: jax.Array, strides: tuple[int, int], padding: Pairs) -> Any:
    cpu, usual = (partial(function, strides=strides, padding=padding) for function in (cpu, usual))
    if jax.device_count() > 1:
        return usual(*arrays)
    return lax.platform_dependent(*arrays, cpu=cpu, default=usual)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Pairs) -> jax.Array:
    return _by_platform(cpu_convolution, plain, x, kernel, strides=strides, padding=padding)


def _forward(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Pairs) -> tuple[jax.Array, Any]:
    return _convolve(x, kernel, strides, padding), (x, kernel)


def _backward(strides: tuple[int, int], padding: Pairs, saved: Any, out: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _by_platform(cpu_gradients, plain_gradients, *saved, out, strides=strides, padding=padding)


_convolve.defvjp(_forward, _backward)


def plain_gradients(
    x: jax.Array, kernel: jax.Array, out: jax.Array, strides: tuple[int, int], padding: Pairs
) -> tuple[jax.Array, jax.Array]:
    """Computes XLA's gradients of input and kernel; the arguments are those of `cpu_gradients`."""
    _, gradients = jax.vjp(lambda x, kernel: plain(x, kernel, strides, padding), x, kernel)
    of_x, of_kernel = gradients(out)
    return of_x, of_kernel


def cpu_gradients(
    x: jax.Array, kernel: jax.Array, out: jax.Array, strides: tuple[int, int], padding: Pairs
) -> tuple[jax.Array, jax.Array]:
    """Computes the gradients of a convolution's input [B, H, W, C] and kernel [h, w, C, C'].

    Args:
        x: [B, H, W, C], the input.
        kernel: [h, w, C, C'], the kernel.
        out: [B, H', W', C'], the gradient with respect to the output.
        strides: Strides of rows and columns.
        padding: Rows and columns of zeros (before, after).
    """
    if _suits_winograd(x, kernel, strides, padding):
        return winograd.input_gradient(out, kernel, padding), winograd.kernel_gradient(x, out, padding)
    return _of_input(x, kernel, out, strides, padding), _of_kernel(x, kernel, out, strides, padding)


def _of_input(x: jax.Array, kernel: jax.Array, out: jax.Array, strides: tuple[int, int], padding: Pairs) -> jax.Array:
    margins = []
    for axis in (0, 1):
        before = kernel.shape[axis] - 1 - padding[axis][0]
        spread = strides[axis] * (out.shape[1 + axis] - 1) + 1
        margins.append((before, x.shape[1 + axis] + kernel.shape[axis] - 1 - before - spread))
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    return lax.conv_general_dilated(out, turned, (1, 1), margins, lhs_dilation=strides, dimension_numbers=LAYOUT)


def _of_kernel(x: jax.Array, kernel: jax.Array, out: jax.Array, strides: tuple[int, int], padding: Pairs) -> jax.Array:
    patches = math.prod(out.shape[1:3]) * math.prod(kernel.shape[:3]) * x.dtype.itemsize
    fewest = FEWEST_IMAGES if out.shape[-1] < FEW_CHANNELS else 1
    part = nearest_divisor(len(x), max(PATCH_BYTES / patches, fewest))
    margins = []
    for axis in (0, 1):
        reach = strides[axis] * (out.shape[1 + axis] - 1) + kernel.shape[axis]
        margins.append((padding[axis][0], reach - padding[axis][0] - x.shape[1 + axis]))

    def gradient_of_part(x: jax.Array, out: jax.Array) -> jax.Array:
        # The channels take the place of the batch, and the batch that of the channels that a convolution sums over.
        images, taps = x.transpose(3, 1, 2, 0), out.transpose(1, 2, 0, 3)
        gradient = lax.conv_general_dilated(
            images, taps, (1, 1), margins, rhs_dilation=strides, dimension_numbers=LAYOUT
        )
        return gradient.transpose(1, 2, 0, 3)

    return sum_over_parts(gradient_of_part, (x, out), part, kernel.shape)
