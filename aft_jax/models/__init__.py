"""Image classifiers as Flax linen modules: pure functions of (variables, images).

Every module takes float32 images [B, H, W, C] in [0, 1], normalises them itself, and returns float32 logits [B, K].
With `features=True` it returns (logits, feature maps of its blocks, first to last).
"""

from dataclasses import dataclass
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from aft_jax.models import cpu_compilation, custom
from aft_jax.models.mnist_cnn import MnistCNN
from aft_jax.models.preact_resnet import BLOCKS, PreActResNet
from aft_jax.models.resnet import ResNet
from aft_jax.models.vgg_bn import CONVOLUTIONS, VGG

NAMES = ('mnist_cnn', 'preact_resnet', 'resnet', 'vgg_bn')
# Depths of the models that come in several.
DEPTHS = {'preact_resnet': tuple(BLOCKS), 'resnet': tuple(BLOCKS), 'vgg_bn': tuple(CONVOLUTIONS)}
# Common names that contain the depth: 'preact_resnet18', and torchvision's 'vgg11_bn'.
COMBINED = {f'{name}{depth}': (name, depth) for name, depths in DEPTHS.items() for depth in depths} | {
    f'vgg{depth}_bn': ('vgg_bn', depth) for depth in CONVOLUTIONS
}


def build(config: ml_collections.ConfigDict, num_classes: int) -> nn.Module:
    """Builds the classifier that `config.model` and `config.dtype` describe, without parameters.

    Raises:
        UserError: If `config.model.factory` does not make a classifier.
    """
    options = config.model
    if options.factory:
        return custom.make(options.factory, num_classes, tuple(options.mean), tuple(options.std))
    common = {
        'num_classes': num_classes,
        'mean': tuple(options.mean),
        'std': tuple(options.std),
        'dtype': jnp.dtype(config.dtype),
    }
    match options.name:
        case 'mnist_cnn':
            return MnistCNN(dropout=options.dropout, conv_bias=options.conv_bias, **common)
        case 'preact_resnet':
            return PreActResNet(depth=options.depth, width=options.width, final_norm=options.final_norm, **common)
        case 'resnet':
            return ResNet(depth=options.depth, width=options.width, stem=options.stem, **common)
        case 'vgg_bn':
            return VGG(
                depth=options.depth,
                width=options.width,
                pool_size=options.pool_size,
                hidden=options.hidden,
                dropout=options.dropout,
                **common,
            )
    raise ValueError(f'no model is called {options.name!r}')


def initialise(module: nn.Module, key: jax.Array, image_shape: tuple[int, int, int]) -> dict:
    """Draws fresh variables {'params', 'batch_stats'} for images of shape (H, W, C).

    A module with a method `initial_variables` brings its own, and the key has no influence.
    """
    if hasattr(module, 'initial_variables'):
        return module.initial_variables()
    return jax.jit(module.init)(key, jnp.zeros((1, *image_shape), jnp.float32))


@dataclass(frozen=True, eq=False)
class EvaluationLogits:
    """Logits of a classifier in evaluation mode (running BatchNorm statistics, no dropout), as a function of images.

    Attributes:
        module: Classifier.
        variables: Variables of the classifier.
        slow_in_loops: Whether its gradients are slow inside a compiled loop, see `cpu_compilation.slow_in_loops`.
    """

    module: nn.Module
    variables: Any
    slow_in_loops: bool

    def __call__(self, images: jax.Array) -> jax.Array:
        """Computes the logits [B, K] of float32 images [B, H, W, C] in [0, 1]."""
        return cast(jax.Array, self.module.apply(self.variables, images))


def logits_function(module: nn.Module, variables: Any) -> EvaluationLogits:
    """Binds a classifier to its variables: images -> logits in evaluation mode."""
    return EvaluationLogits(module, variables, cpu_compilation.slow_in_loops(module))
