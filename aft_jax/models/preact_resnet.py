"""Pre-activation residual networks for small images.

Source: He et al., "Identity Mappings in Deep Residual Networks" (2016).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from aft_jax.models.classifier import Classifier
from aft_jax.models.layers import batch_norm, conv

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
BOTTLENECK_DEPTHS = (50,)
EXPANSION = 4


class Block(nn.Module):
    """Two 3x3 convolutions (basic) or 1x1, 3x3, 1x1 (bottleneck), each after BatchNorm and ReLU, plus the shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution of the output of the first BatchNorm and ReLU.
    """

    channels: int
    stride: int
    bottleneck: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def norm_relu(y):
            return nn.relu(batch_norm(y, train=train, dtype=self.dtype))

        def convolve(y, channels, kernel, stride, name=None):
            return conv(channels, kernel, stride, dtype=self.dtype, use_bias=False, name=name)(y)

        out_channels = self.channels * (EXPANSION if self.bottleneck else 1)
        y = norm_relu(x)
        shortcut = x
        if self.stride != 1 or x.shape[-1] != out_channels:
            shortcut = convolve(y, out_channels, 1, self.stride, name='shortcut')
        if self.bottleneck:
            y = convolve(y, self.channels, 1, 1)
            y = convolve(norm_relu(y), self.channels, 3, self.stride)
            y = convolve(norm_relu(y), out_channels, 1, 1)
        else:
            y = convolve(y, self.channels, 3, self.stride)
            y = convolve(norm_relu(y), self.channels, 3, 1)
        return y + shortcut


def residual_stages(
    block: Callable[..., nn.Module], x: jax.Array, depth: int, width: int, dtype: Any, train: bool
) -> tuple[jax.Array, ...]:
    """Computes the maps [B, H, W, C] of four stages, strides 1, 2, 2, 2; called within a module's compact method.

    Args:
        block: Class of the residual blocks, such as `Block`.
        x: Output of the stem, [B, H, W, C].
        depth: Key of BLOCKS.
        width: Channels of the first stage.
        dtype: Dtype of the computation.
        train: Whether batch statistics are used.
    """
    block_outputs = []
    for stage, blocks in enumerate(BLOCKS[depth]):
        for number in range(blocks):
            x = block(
                channels=width * 2**stage,
                stride=2 if stage > 0 and number == 0 else 1,
                bottleneck=depth in BOTTLENECK_DEPTHS,
                dtype=dtype,
                name=f'stage{stage + 1}_block{number + 1}',
            )(x, train)
        block_outputs.append(x)
    return tuple(block_outputs)


def average_head(x: jax.Array, num_classes: int) -> jax.Array:
    """Computes logits, float32 [B, K], by a dense layer 'head' on the average of a map [B, H, W, C] over its pixels."""
    return nn.Dense(num_classes, dtype=jnp.float32, name='head')(x.astype(jnp.float32).mean(axis=(1, 2)))


class PreActResNet(Classifier):
    """PreActResNet 18, 34 or 50: conv 3x3, four stages (strides 1, 2, 2, 2), global average, linear.

    The network of the AFT authors' release has no BatchNorm and ReLU between the last block and the pooling.
    `final_norm=True` gives the usual variant, which has both.

    Attributes:
        depth: 18, 34 or 50.
        width: Channels of the first stage: 64 in the papers, fewer for training on a CPU.
        final_norm: Whether BatchNorm and ReLU come before the pooling.
    """

    depth: int = 18
    width: int = 64
    final_norm: bool = False

    def blocks(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Computes the maps of the four stages."""
        x = conv(self.width, 3, 1, dtype=self.dtype, use_bias=False, name='stem')(x)
        return residual_stages(Block, x, self.depth, self.width, self.dtype, train)

    def head(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes the logits from the average of the last map."""
        if self.final_norm:
            x = nn.relu(batch_norm(x, train=train, dtype=self.dtype, name='final_norm_layer'))
        return average_head(x, self.num_classes)
