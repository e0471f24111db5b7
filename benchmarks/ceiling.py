"""Measures the limit of the device: FLOP/s of a large matrix product and a large convolution, in jax or torch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.record import Ceiling
from benchmarks.timing import Work, clock, warm_up

TRIALS = 5
# Side of the matrices; number, side and channels of the images. The kernels are 3x3.
LARGE = {'cpu': (2048, (32, 32, 128)), 'gpu': (8192, (512, 32, 256))}


def measure(dtype: str) -> Ceiling:
    """Measures both in a dtype ('float32' or 'bfloat16'), on the device that jax uses."""
    backend = jax.default_backend()
    device = 'cuda' if backend == 'gpu' else 'cpu'
    size, (images, side, channels) = LARGE['cpu' if backend == 'cpu' else 'gpu']
    generator = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, np.float32)

    def best(flops: int, ours: Callable, theirs: Callable, a: np.ndarray, b: np.ndarray) -> float:
        at_ours = [jnp.asarray(x, dtype) for x in (a, b)]
        at_theirs = [torch.from_numpy(x).to(device, getattr(torch, dtype)) for x in (a, b)]
        if a.ndim == 4:
            # NHWC to NCHW, and HWIO to OIHW. The memory of the images does not change: it is channels last already.
            at_theirs = [at_theirs[0].permute(0, 3, 1, 2), at_theirs[1].permute(3, 2, 0, 1)]
            at_theirs[1] = at_theirs[1].contiguous(memory_format=torch.channels_last)
        return max(_rate(flops, ours, at_ours, _wait_ours), _rate(flops, theirs, at_theirs, _wait_theirs))

    convolve = jax.jit(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    )
    return Ceiling(
        best(2 * size**3, jax.jit(jnp.matmul), torch.matmul, noise(size, size), noise(size, size)),
        best(
            2 * images * side**2 * channels**2 * 9,
            convolve,
            lambda x, k: F.conv2d(x, k, padding=1),
            noise(images, side, side, channels),
            noise(3, 3, channels, channels),
        ),
    )


def _rate(flops: int, function: Callable, arguments: list, wait: Callable) -> float:
    def run(times: int) -> None:
        for _ in range(times):
            result = function(*arguments)
        wait(result)

    ready = warm_up(Work(run, lambda: 0.0))
    return flops / min(clock(ready.work, ready.repeats) for _ in range(TRIALS))


def _wait_ours(result: jax.Array) -> None:
    result.block_until_ready()


def _wait_theirs(result: torch.Tensor) -> None:
    if result.is_cuda:
        torch.cuda.synchronize()
