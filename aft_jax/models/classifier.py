"""The base of the classifiers: normalise the images, compute feature maps, compute logits from the last of them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from aft_jax.models.layers import normalise


class Classifier(nn.Module):
    """An image classifier whose subclasses define the feature maps and the head.

    Class attributes that `models.cpu_compilation` reads, and that a network of the user's own may set:
        fast_in_loops: Whether the gradients are fast in a loop on a CPU: all convolutions are those of `layers.conv`.
        small: Whether starting a compiled call takes a noticeable part of the time of a training step on a CPU.

    Attributes:
        num_classes: K.
        mean: Pixel mean, one value or one per channel.
        std: Pixel standard deviation, one value or one per channel.
        dtype: Dtype of the computation; parameters are float32.
    """

    fast_in_loops = True
    small = False

    num_classes: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, features: bool = False):
        """Computes the logits of a batch.

        Args:
            images: float32 [B, H, W, C] in [0, 1].
            train: Whether BatchNorm uses the statistics of the batch and dropout is on.
            features: Whether the feature maps are returned too.

        Returns:
            float32 logits [B, K]; with `features`, (logits, feature maps [B, h, w, c] of each block, first to last).
        """
        block_outputs = self.blocks(normalise(images, self.mean, self.std, self.dtype), train)
        logits = self.head(block_outputs[-1], train).astype(jnp.float32)
        return (logits, block_outputs) if features else logits

    def blocks(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Computes the feature maps of the normalised images, first to last."""
        raise NotImplementedError

    def head(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes the logits from the last feature map."""
        raise NotImplementedError
