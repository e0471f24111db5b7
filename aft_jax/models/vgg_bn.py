"""VGG networks with BatchNorm, as torchvision has them.

Source: Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2015).
"""

import flax.linen as nn
import jax

from aft_jax.models.classifier import Classifier
from aft_jax.models.layers import adaptive_average_pool, batch_norm, conv, max_pool

# Number of convolutions of each stage.
CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
# Channels of each stage, as multiples of those of the first.
GROWTH = (1, 2, 4, 8, 8)
# Each of five stages halves the image, rounding down.
SMALLEST_SIDE = 32


class VGG(Classifier):
    """VGG 11, 13, 16 or 19: five stages of [conv 3x3, BatchNorm, ReLU] and a 2x2 max pool; three dense layers.

    For every image size, the first dense layer reads `pool_size` x `pool_size` averages of the last maps. The feature
    maps are those before the pooling of their stage.

    Attributes:
        depth: 11, 13, 16 or 19.
        width: Channels of the first stage; 64 in the paper.
        pool_size: Side of the averaged maps; 7 in torchvision, for small images as well.
        hidden: Units of each of the two hidden dense layers; 4096 in the paper.
        dropout: Share of those units dropped while training; 0.5 in the paper, 0.3 in `config.model`.
    """

    depth: int = 16
    width: int = 64
    pool_size: int = 7
    hidden: int = 4096
    dropout: float = 0.3

    def blocks(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Computes the maps of the five stages."""
        block_outputs: list[jax.Array] = []
        for stage, count in enumerate(CONVOLUTIONS[self.depth], start=1):
            if block_outputs:
                x = max_pool(x, 2, 2, 0)
            for i in range(1, count + 1):
                channels = self.width * GROWTH[stage - 1]
                x = conv(channels, 3, 1, dtype=self.dtype, use_bias=True, name=f'stage{stage}_conv{i}')(x)
                x = nn.relu(batch_norm(x, train=train, dtype=self.dtype, name=f'stage{stage}_norm{i}'))
            block_outputs.append(x)
        return tuple(block_outputs)

    def head(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes the logits by three dense layers on averages of the pooled last map."""
        x = adaptive_average_pool(max_pool(x, 2, 2, 0), self.pool_size)
        x = x.reshape((x.shape[0], -1))
        for name in ('dense1', 'dense2'):
            x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name=name)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x)
