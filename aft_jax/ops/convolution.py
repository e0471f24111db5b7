"""A convolution that is fast on a CPU, and so are its gradients; everywhere else they are XLA's own.

On a CPU, 3x3 of stride 1 in float32 between WIDE channels or more goes by way of `winograd`, and a first layer or
a shortcut is one matrix product. For the others, two traps of XLA's CPU backend, and the way around them:

- For the gradient of the weights it gathers the patches of the whole batch before it multiplies them: 300 MB for 128
  images of 32x32x64, ten times as slow as the convolution itself. Here a loop takes a few images at a time, whose
  patches stay in the cache, and adds up.
- Inside a loop it has a fast kernel for convolutions in the layout NHWC, HWIO alone, which its own gradients do not
  have (https://github.com/jax-ml/jax/issues/12868). Here both gradients are written as convolutions in that layout.

The results are the same up to float32 rounding. CPUs with several (virtual) devices see the plain ones, because a batch
that is cut among them should not be cut again.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from aft_jax.ops import winograd
from aft_jax.ops.tiling import nearest_divisor, summed

# Of one part of the batch. Measured: 2 to 8 MB are much alike, 16 MB is slower.
PATCH_BYTES = 2_000_000
# Below 32 channels of output a part of fewer images is up to ten times as slow, whatever its size.
FEW_CHANNELS, FEWEST_IMAGES = 32, 8
# Measured: with 32 channels winograd is 1.5 times as fast, with 16 the same, with 8 or 3 often slower.
WIDE = 32
LAYOUT = ('NHWC', 'HWIO', 'NHWC')
Pairs = tuple[tuple[int, int], tuple[int, int]]


def convolve(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]], **plain: Any
) -> jax.Array:
    """The convolution as `flax.linen.Conv` calls it.

    Args:
        x: [B, H, W, C].
        kernel: [h, w, C, C'], of the same dtype.
        strides: Of rows and columns.
        padding: Rows and columns of zeros (before, after).
        plain: What `flax.linen.Conv` adds: no dilation, one group, no preferred dtype.

    Returns:
        [B, H', W', C'], of the same dtype.

    Raises:
        ValueError: A dilated or grouped convolution.
    """
    given = {name: value for name, value in plain.items() if name != 'dimension_numbers'}
    unusual = {name: value for name, value in given.items() if value not in (None, 1, (1, 1), [1, 1])}
    if unusual:
        raise ValueError(f'not a plain convolution: {unusual}')
    (top, bottom), (left, right) = padding
    return _convolve(x, kernel, (strides[0], strides[1]), ((top, bottom), (left, right)))


def plain(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Pairs) -> jax.Array:
    """XLA's convolution, with XLA's gradients."""
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)


def cpu_convolution(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Pairs) -> jax.Array:
    """The same, as a CPU is to compute it."""
    if _suits_winograd(x, kernel, strides, padding):
        return winograd.convolve(x, kernel, padding)
    if math.prod(kernel.shape[:3]) <= kernel.shape[3]:
        return _by_patches(x, kernel, strides, padding)
    return plain(x, kernel, strides, padding)


def _by_patches(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Pairs) -> jax.Array:
    """One matrix product, for layers whose patches are no larger than their output: a first one, a shortcut of 1x1."""
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
    """Returns the gradients of input and kernel as XLA computes them; arguments as for `cpu_gradients`."""
    _, gradients = jax.vjp(lambda x, kernel: plain(x, kernel, strides, padding), x, kernel)
    of_x, of_kernel = gradients(out)
    return of_x, of_kernel


def cpu_gradients(
    x: jax.Array, kernel: jax.Array, out: jax.Array, strides: tuple[int, int], padding: Pairs
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of a convolution's input [B, H, W, C] and kernel [h, w, C, C'].

    Args:
        x: [B, H, W, C], its input.
        kernel: [h, w, C, C'].
        out: [B, H', W', C'], the gradient of its output.
        strides: Of rows and columns.
        padding: Of rows and columns, (before, after).
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

    def of_part(x: jax.Array, out: jax.Array) -> jax.Array:
        # Channels stand in for the batch, and the batch for the channels that a convolution sums over.
        images, taps = x.transpose(3, 1, 2, 0), out.transpose(1, 2, 0, 3)
        gradient = lax.conv_general_dilated(
            images, taps, (1, 1), margins, rhs_dilation=strides, dimension_numbers=LAYOUT
        )
        return gradient.transpose(1, 2, 0, 3)

    return summed(of_part, (x, out), part, kernel.shape)
