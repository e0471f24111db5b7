"""The head of a classifier, which is the dense layer that gives the logits, and its place among the parameters."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Names of the modules that contain the head, and of the head itself: ('head',), or () for a bare nn.Dense.
HeadPath = tuple[str, ...]


def find_head(module: nn.Module, image_shape: tuple[int, ...]) -> HeadPath | None:
    """Finds the dense layer that is called last, if its outputs have the shape of the logits.

    Args:
        module: Classifier.
        image_shape: (H, W, C).

    Returns:
        The path of the layer in 'params', or None if the network does not end with a dense layer.
    """
    calls: list[tuple[HeadPath, tuple[int, ...]]] = []

    def intercept(call, arguments, options, context):
        output = call(*arguments, **options)
        if isinstance(context.module, nn.Dense) and context.method_name == '__call__':
            calls.append((context.module.path, output.shape))
        return output

    with nn.intercept_methods(intercept):
        images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        logits, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
    return calls[-1][0] if calls and calls[-1][1] == logits.shape else None


def layer_at(params: Any, path: HeadPath) -> dict[str, jax.Array]:
    """Returns the parameters of the layer at a path."""
    for name in path:
        params = params[name]
    return params


def replace_layer(params: Any, path: HeadPath, layer: dict[str, jax.Array]) -> Any:
    """Copies the parameters, with other ones for the layer at a path."""
    if not path:
        return layer
    return params | {path[0]: replace_layer(params[path[0]], path[1:], layer)}
