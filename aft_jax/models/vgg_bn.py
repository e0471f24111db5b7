"""VGG networks with BatchNorm, as torchvision has them.

Source: Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2015).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from aft_jax.models.layers import adaptive_average_pool, batch_norm, conv, max_pool, normalise

# Convolutions of each stage.
CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
# Channels of each stage, in those of the first.
GROWTH = (1, 2, 4, 8, 8)
# Each of five stages halves the image, rounding down.
SMALLEST_SIDE = 32


class VGG(nn.Module):
    """VGG 11, 13, 16 or 19: five stages of [conv 3x3, BatchNorm, ReLU] and a 2x2 max pool; three dense layers.

    Whatever the size of the image, the first dense layer sees `pool_size` x `pool_size` averages of the last maps. The
    feature maps are those before the pooling of their stage.

    Attributes:
        num_classes: K.
        dropout: Share of the units of the hidden dense layers dropped while training; 0.5 in the paper.
        depth: 11, 13, 16 or 19.
        width: Channels of the first stage; 64 in the paper.
        pool_size: 7 in torchvision, for small images as well.
        hidden: Units of each of the two hidden dense layers; 4096 in the paper.
        mean: Pixel mean, one value or one a channel.
        std: Pixel standard deviation, likewise.
        dtype: Of the computation; parameters are float32.
    """

    num_classes: int
    dropout: float
    depth: int = 16
    width: int = 64
    pool_size: int = 7
    hidden: int = 4096
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, features: bool = False):
        x = normalise(images, self.mean, self.std, self.dtype)
        stages = []
        for stage, count in enumerate(CONVOLUTIONS[self.depth], start=1):
            for i in range(1, count + 1):
                channels = self.width * GROWTH[stage - 1]
                x = conv(channels, 3, 1, dtype=self.dtype, use_bias=True, name=f'stage{stage}_conv{i}')(x)
                x = nn.relu(batch_norm(x, train=train, dtype=self.dtype, name=f'stage{stage}_norm{i}'))
            stages.append(x)
            x = max_pool(x, 2, 2, 0)
        x = adaptive_average_pool(x, self.pool_size)
        x = x.reshape((x.shape[0], -1))
        for name in ('dense1', 'dense2'):
            x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name=name)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x).astype(jnp.float32)
        return (logits, tuple(stages)) if features else logits
