"""Pre-activation residual networks for small images.

Source: He et al., "Identity Mappings in Deep Residual Networks" (2016).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from aft_jax.models.layers import batch_norm, conv, normalise

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
BOTTLENECK_DEPTHS = (50,)
EXPANSION = 4


class Block(nn.Module):
    """Two 3x3 convolutions (basic) or 1x1, 3x3, 1x1 (bottleneck), each after BatchNorm and ReLU, plus the shortcut.

    The 1x1 projection shortcut, where the shape changes, is taken after the first BatchNorm and ReLU.
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
    """Returns the maps [B, H, W, C] of four stages, strides 1, 2, 2, 2; called within a module's compact method.

    Args:
        block: A class of blocks, such as `Block`.
        x: [B, H, W, C], of the stem.
        depth: Of BLOCKS.
        width: Channels of the first stage.
        dtype: Of the computation.
        train: Whether batch statistics are used.
    """
    stages = []
    for stage, blocks in enumerate(BLOCKS[depth]):
        for number in range(blocks):
            x = block(
                channels=width * 2**stage,
                stride=2 if stage > 0 and number == 0 else 1,
                bottleneck=depth in BOTTLENECK_DEPTHS,
                dtype=dtype,
                name=f'stage{stage + 1}_block{number + 1}',
            )(x, train)
        stages.append(x)
    return tuple(stages)


class PreActResNet(nn.Module):
    """PreActResNet 18, 34 or 50: conv 3x3, four stages (strides 1, 2, 2, 2), global average, linear.

    As in the network of the AFT authors' release there is no BatchNorm and ReLU between the last block and the
    pooling; `final_norm=True` gives the usual variant.

    Attributes:
        num_classes: K.
        depth: 18, 34 or 50.
        width: Channels of the first stage; 64 in the papers, less trains on a CPU.
        final_norm: BatchNorm and ReLU before the pooling.
        mean: Pixel mean, one value or one a channel.
        std: Pixel standard deviation, likewise.
        dtype: Of the computation; parameters are float32.
    """

    num_classes: int
    depth: int = 18
    width: int = 64
    final_norm: bool = False
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, features: bool = False):
        x = normalise(images, self.mean, self.std, self.dtype)
        x = conv(self.width, 3, 1, dtype=self.dtype, use_bias=False, name='stem')(x)
        stages = residual_stages(Block, x, self.depth, self.width, self.dtype, train)
        x = stages[-1]
        if self.final_norm:
            x = nn.relu(batch_norm(x, train=train, dtype=self.dtype, name='final_norm_layer'))
        x = x.astype(jnp.float32).mean(axis=(1, 2))
        logits = nn.Dense(self.num_classes, dtype=jnp.float32, name='head')(x)
        return (logits, stages) if features else logits
