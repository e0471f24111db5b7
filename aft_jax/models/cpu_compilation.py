"""How XLA is to compile a network for a CPU.

For convolutions and matrix products XLA has kernels of two libraries, YNNPACK and Eigen. YNNPACK's convolutions use one
core, Eigen's all of them. Products are faster by YNNPACK in a small network without `winograd`, and by Eigen in others.
The sums are left to YNNPACK. Measured: docs/benchmarks.md.
"""

from functools import cache

import flax.linen as nn
import jax

from aft_jax.models.mnist_cnn import MnistCNN
from aft_jax.models.preact_resnet import PreActResNet
from aft_jax.models.resnet import ResNet
from aft_jax.models.vgg_bn import VGG

# What YNNPACK computes.
OPTION = 'xla_cpu_experimental_ynn_fusion_type'
SUMS, PRODUCTS = 'LIBRARY_FUSION_TYPE_REDUCE', 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'


def compiler_options(module: nn.Module) -> dict[str, str] | None:
    """Returns what `jax.jit(compiler_options=...)` is to get for programs of a network; None for the defaults.

    Those are taken by other devices, by several (virtual) ones, and by a version of XLA that does not know the option.
    """
    options = {OPTION: f'{SUMS},{PRODUCTS}' if isinstance(module, MnistCNN) else SUMS}
    return options if jax.default_backend() == 'cpu' and jax.device_count() == 1 and _known() else None


def steps_per_call(module: nn.Module) -> int:
    """Returns up to how many training steps of a network one call had better take.

    In a small network a fifteenth of the time of a step goes into the call. In others that is nothing, and a run which
    is told to stop should not go on for five of their steps.
    """
    return 5 if isinstance(module, MnistCNN) and not slow_in_loops(module) else 1


def slow_in_loops(module: nn.Module) -> bool:
    """Returns whether steps that take gradients of a network had better not be a loop.

    XLA's CPU backend computes the gradient of a convolution inside a loop many times slower, but not those of
    `convolution`, which our networks have on a single device. For them a loop saves memory and compilation.
    """
    ours = isinstance(module, MnistCNN | PreActResNet | ResNet | VGG) and jax.device_count() == 1
    return jax.default_backend() == 'cpu' and not ours


@cache
def _known() -> bool:
    try:
        jax.jit(lambda x: x, compiler_options={OPTION: f'{SUMS},{PRODUCTS}'}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
