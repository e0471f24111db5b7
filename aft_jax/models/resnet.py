"""Residual networks with BatchNorm and ReLU after each convolution: torchvision's, and variants for small images.

Source: He et al., "Deep Residual Learning for Image Recognition" (2016). In a bottleneck block the 3x3 convolution has
the stride, as in torchvision.
"""

from typing import Any

import flax.linen as nn
import jax

from aft_jax.models.classifier import Classifier
from aft_jax.models.layers import batch_norm, conv, max_pool
from aft_jax.models.preact_resnet import EXPANSION, average_head, residual_stages

STEMS = ('imagenet', 'cifar')


class Block(nn.Module):
    """Two 3x3 convolutions (basic) or 1x1, 3x3, 1x1 (bottleneck), each before BatchNorm, plus the shortcut, then ReLU.

    Where the shape changes, the shortcut is a 1x1 convolution and a BatchNorm.
    """

    channels: int
    stride: int
    bottleneck: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def conv_norm(y, channels, kernel, stride, name=None):
            y = conv(channels, kernel, stride, dtype=self.dtype, use_bias=False, name=name)(y)
            return batch_norm(y, train=train, dtype=self.dtype, name=f'{name}_norm' if name else None)

        out_channels = self.channels * (EXPANSION if self.bottleneck else 1)
        if self.bottleneck:
            y = nn.relu(conv_norm(x, self.channels, 1, 1))
            y = nn.relu(conv_norm(y, self.channels, 3, self.stride))
            y = conv_norm(y, out_channels, 1, 1)
        else:
            y = nn.relu(conv_norm(x, self.channels, 3, self.stride))
            y = conv_norm(y, out_channels, 3, 1)
        if self.stride != 1 or x.shape[-1] != out_channels:
            x = conv_norm(x, out_channels, 1, self.stride, name='shortcut')
        return nn.relu(y + x)


class ResNet(Classifier):
    """ResNet 18, 34 or 50: stem, four stages (strides 1, 2, 2, 2), global average, linear.

    Attributes:
        depth: 18, 34 or 50.
        width: Channels of the first stage; 64 in the paper.
        stem: 'imagenet', a 7x7 convolution of stride 2 and a 3x3 max pool of stride 2; or 'cifar', a 3x3 convolution.
    """

    depth: int = 18
    width: int = 64
    stem: str = 'imagenet'

    def blocks(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Computes the maps of the four stages."""
        large = self.stem == 'imagenet'
        x = conv(self.width, 7 if large else 3, 2 if large else 1, dtype=self.dtype, use_bias=False, name='stem')(x)
        x = nn.relu(batch_norm(x, train=train, dtype=self.dtype, name='stem_norm'))
        if large:
            x = max_pool(x, 3, 2, 1)
        return residual_stages(Block, x, self.depth, self.width, self.dtype, train)

    def head(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes the logits from the average of the last map."""
        return average_head(x, self.num_classes)
