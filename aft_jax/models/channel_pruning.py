"""The layer that reads a classifier's last feature map, what it reads, and how to make it blind to a channel.

Between the two there may be more than a reshaping (BatchNorm and ReLU, pooling), but the channels of the map stay the
last axis through all of it. So row r of the reader's kernel belongs to channel r mod C.
"""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

Change = Callable[[jax.Array], jax.Array]


def reader(module: nn.Module, variables: Any, image_shape: tuple[int, ...]) -> str:
    """Returns the name of the reader in 'params': the first dense layer, as no classifier here has one any earlier.

    Args:
        module: The classifier.
        variables: Its own.
        image_shape: (H, W, C').
    """
    names = []

    def watch(call, arguments, options, context):
        if isinstance(context.module, nn.Dense):
            names.append(context.module.path[0])
        return call(*arguments, **options)

    with nn.intercept_methods(watch):
        jax.eval_shape(module.apply, variables, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return names[0]


def head_inputs(module: nn.Module, name: str, variables: Any, images: jax.Array) -> jax.Array:
    """Returns what the reader takes in of each channel, the model in evaluation mode.

    Args:
        module: The classifier.
        name: Of the reader.
        variables: The classifier's.
        images: float32 [B, H, W, C'] in [0, 1].

    Returns:
        float32 [B, P, C] for a last feature map of C channels, read at P positions (1 after an average over them).
    """
    seen = []

    def keep(x: jax.Array) -> jax.Array:
        seen.append(x)
        return x

    with nn.intercept_methods(_before(name, keep)):
        _, maps = cast(Any, module.apply(variables, images, features=True))
    return seen[0].astype(jnp.float32).reshape(len(images), -1, maps[-1].shape[-1])


def masked_logits(module: nn.Module, name: str, variables: Any, images: jax.Array, kept: jax.Array) -> jax.Array:
    """Returns the logits [B, K] of the model with its reader blind to some channels, in evaluation mode.

    As `without` on the kernel, but cheap under vmap over `kept`: nothing before the reader depends on it, and the
    kernel, which may be large, stays one.

    Args:
        module: The classifier.
        name: Of the reader.
        variables: The classifier's.
        images: float32 [B, H, W, C'] in [0, 1].
        kept: float32 [C], 1 for a channel that is read and 0 for one that is not.
    """

    def cover(x: jax.Array) -> jax.Array:
        return x * _spread(kept, x.shape[-1])[None, :].astype(x.dtype)

    with nn.intercept_methods(_before(name, cover)):
        return cast(jax.Array, module.apply(variables, images))


def without(params: dict, name: str, kept: jax.Array) -> dict:
    """Returns the parameters with the reader's rows of some channels set to zero; arguments as for `masked_logits`."""
    kernel = params[name]['kernel']
    return params | {name: params[name] | {'kernel': kernel * _spread(kept, len(kernel))[:, None]}}


def _spread(kept: jax.Array, rows: int) -> jax.Array:
    return jnp.tile(kept, rows // len(kept))


def _before(name: str, change: Change) -> Callable:
    """Returns what Flax calls around each layer: it changes the input of the one with this name."""

    def intercept(call, arguments, options, context):
        if context.module.path == (name,) and context.method_name == '__call__':
            arguments = (change(arguments[0]), *arguments[1:])
        return call(*arguments, **options)

    return intercept
