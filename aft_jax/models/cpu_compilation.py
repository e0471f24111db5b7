"""Options with which XLA compiles a network for a CPU.

XLA has kernels of two libraries for convolutions and matrix products: YNNPACK and Eigen. YNNPACK's convolutions use one
core, Eigen's use all cores. Matrix products are faster with YNNPACK in a small network without `winograd`, and with
Eigen in other networks. Sums are left to YNNPACK. Measured: docs/benchmarks.md.

A network states what it is by two class attributes, `fast_in_loops` and `small` (see `models.classifier.Classifier`). A
network of the user's own that lacks an attribute counts as False.
"""

from functools import cache

import flax.linen as nn
import jax

# The option lists the operations that YNNPACK computes.
OPTION = 'xla_cpu_experimental_ynn_fusion_type'
SUMS, PRODUCTS = 'LIBRARY_FUSION_TYPE_REDUCE', 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'


def compiler_options(module: nn.Module) -> dict[str, str] | None:
    """Chooses the `compiler_options` of `jax.jit` for programs of a network; None for XLA's defaults.

    The defaults serve accelerators, several (virtual) devices, and versions of XLA without the option.
    """
    options = {OPTION: f'{SUMS},{PRODUCTS}' if _is_small(module) else SUMS}
    return options if jax.default_backend() == 'cpu' and jax.device_count() == 1 and _known() else None


def steps_per_call(module: nn.Module) -> int:
    """Returns the largest useful number of training steps per compiled call on a CPU.

    In a small network the call takes a fifteenth of the time of a step, in other networks next to nothing. There, one
    step per call lets a run that was asked to stop do so sooner.
    """
    return 5 if _is_small(module) and not slow_in_loops(module) else 1


def slow_in_loops(module: nn.Module) -> bool:
    """Returns whether steps that take gradients of a network should be unrolled instead of compiled as a loop.

    XLA's CPU backend computes the gradient of a convolution many times slower inside a loop. The gradients of
    `ops.convolution`, which our networks use on a single device, are as fast inside a loop. There a loop saves memory
    and compilation time.
    """
    fast = getattr(module, 'fast_in_loops', False) and jax.device_count() == 1
    return jax.default_backend() == 'cpu' and not fast


def _is_small(module: nn.Module) -> bool:
    return getattr(module, 'small', False)


@cache
def _known() -> bool:
    try:
        jax.jit(lambda x: x, compiler_options={OPTION: f'{SUMS},{PRODUCTS}'}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
