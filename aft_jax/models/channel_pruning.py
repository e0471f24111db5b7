"""The first dense layer of a classifier, its inputs, and how to remove single channels of the last feature map there.

Between the last feature map and this layer there may be more than a reshaping (BatchNorm and ReLU, pooling), but the
channels stay the last axis. So row r of the layer's kernel belongs to channel r mod C.
"""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from aft_jax.errors import UserError

InputFunction = Callable[[jax.Array], jax.Array]


def first_dense(module: nn.Module, variables: Any, image_shape: tuple[int, ...]) -> str:
    """Finds the name in 'params' of the first dense layer. In all our networks it follows the last feature map.

    Another module names the dense layer that follows its last feature map in an attribute `layer_after_maps`.

    Args:
        module: Classifier.
        variables: Variables of the classifier.
        image_shape: (H, W, C').

    Raises:
        UserError: If no dense layer reads the channels of the last feature map.
    """
    if hasattr(module, 'layer_after_maps'):
        if not module.layer_after_maps:
            raise UserError(
                'this network has no dense layer that reads the channels of its last feature map, so they cannot be '
                "pruned; leave the defense 'fp' out."
            )
        return module.layer_after_maps
    names = []

    def intercept(call, arguments, options, context):
        if isinstance(context.module, nn.Dense):
            names.append(context.module.path[0])
        return call(*arguments, **options)

    with nn.intercept_methods(intercept):
        jax.eval_shape(module.apply, variables, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return names[0]


def head_inputs(module: nn.Module, layer: str, variables: Any, images: jax.Array) -> jax.Array:
    """Computes the first dense layer's inputs by channel, the model in evaluation mode.

    Args:
        module: Classifier.
        layer: Name of the first dense layer.
        variables: Variables of the classifier.
        images: float32 [B, H, W, C'] in [0, 1].

    Returns:
        float32 [B, P, C] for a last feature map of C channels and P positions (1 after an average over positions).
    """
    inputs = []

    def record(x: jax.Array) -> jax.Array:
        inputs.append(x)
        return x

    with nn.intercept_methods(_at_input(layer, record)):
        _, maps = cast(Any, module.apply(variables, images, features=True))
    return inputs[0].astype(jnp.float32).reshape(len(images), -1, maps[-1].shape[-1])


def masked_logits(module: nn.Module, layer: str, variables: Any, images: jax.Array, kept: jax.Array) -> jax.Array:
    """Computes logits [B, K] in evaluation mode, with some channels set to zero in the first dense layer's input.

    The logits are those after `prune_channels`, but cheap under vmap over `kept`: the network before the layer runs
    once, and the kernel, which may be large, is not copied.

    Args:
        module: Classifier.
        layer: Name of the first dense layer.
        variables: Variables of the classifier.
        images: float32 [B, H, W, C'] in [0, 1].
        kept: float32 [C], 1 for a channel that is kept and 0 for one that is removed.
    """

    def mask(x: jax.Array) -> jax.Array:
        return x * _by_row(kept, x.shape[-1])[None, :].astype(x.dtype)

    with nn.intercept_methods(_at_input(layer, mask)):
        return cast(jax.Array, module.apply(variables, images))


def prune_channels(params: dict, layer: str, kept: jax.Array) -> dict:
    """Sets the kernel rows of removed channels to zero; arguments as of `masked_logits`."""
    kernel = params[layer]['kernel']
    return params | {layer: params[layer] | {'kernel': kernel * _by_row(kept, len(kernel))[:, None]}}


def _by_row(kept: jax.Array, rows: int) -> jax.Array:
    """Repeats the values of channels for each row of the kernel."""
    return jnp.tile(kept, rows // len(kept))


def _at_input(layer: str, function: InputFunction) -> Callable:
    """Builds an interceptor for Flax that applies a function to the input of a layer."""

    def intercept(call, arguments, options, context):
        if context.module.path == (layer,) and context.method_name == '__call__':
            arguments = (function(arguments[0]), *arguments[1:])
        return call(*arguments, **options)

    return intercept
