"""A convolution whose gradients are fast on a CPU; everywhere else they are XLA's own.

Two traps of XLA's CPU backend, and the way around them:

- For the gradient of the weights it gathers the patches of the whole batch before it multiplies them: 300 MB for 128
  images of 32x32x64, ten times as slow as the convolution itself. Here a loop takes a few images at a time, whose
  patches stay in the cache, and adds up.
- Inside a loop it has a fast kernel for convolutions in the layout NHWC, HWIO alone, which its own gradients do not
  have (https://github.com/jax-ml/jax/issues/12868). Here both gradients are written as convolutions in that layout.

The results are the same up to float32 rounding. CPUs with several (virtual) devices see the plain gradients, because a
batch that is cut among them should not be cut again.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Of one part of the batch. Measured: 2 to 8 MB are alike, 16 MB is slower.
PATCH_BYTES = 4_000_000
# Below 32 channels of output a part of fewer images is up to ten times as slow, whatever its size.
FEW_CHANNELS, FEWEST_IMAGES = 32, 8
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


_convolve = jax.custom_vjp(plain, nondiff_argnums=(2, 3))


def _forward(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Pairs) -> tuple[jax.Array, Any]:
    return plain(x, kernel, strides, padding), (x, kernel)


def _backward(strides: tuple[int, int], padding: Pairs, saved: Any, out: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    usual = partial(plain_gradients, strides=strides, padding=padding)
    if jax.device_count() > 1:
        return usual(x, kernel, out)
    return lax.platform_dependent(
        x, kernel, out, cpu=partial(cpu_gradients, strides=strides, padding=padding), default=usual
    )


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
    count = len(x)
    patches = math.prod(out.shape[1:3]) * math.prod(kernel.shape[:3]) * x.dtype.itemsize
    fewest = FEWEST_IMAGES if out.shape[-1] < FEW_CHANNELS else 1
    part = nearest_divisor(count, max(PATCH_BYTES / patches, fewest))
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

    if part == count:
        return of_part(x, out)

    def add(total: jax.Array, both: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + of_part(*both), None

    parts = (x.reshape(-1, part, *x.shape[1:]), out.reshape(-1, part, *out.shape[1:]))
    return lax.scan(add, jnp.zeros_like(kernel), parts)[0]


def nearest_divisor(number: int, wanted: float) -> int:
    """Returns the divisor of `number` whose ratio to `wanted` is nearest to 1."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / wanted)))
