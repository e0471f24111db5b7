"""The two networks of the input-aware attack: the generator of patterns and the mask network."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from aft_jax.models.layers import conv
from aft_jax.ops.resampling import upsample_bilinear

SMALL_WIDTHS = (16, 32)
WIDTHS = (32, 64, 128)
LARGEST_SMALL_IMAGE = 32


class EncoderDecoder(nn.Module):
    """Encoder-decoder without skip connections, from images to maps of the same size in (0, 1).

    A block is [conv 3x3, BatchNorm, ReLU]. Each level down is two blocks and a 2x2 max pool, and one block is in the
    middle. Each level up is a bilinear upsampling by 2 and two blocks, of which the second changes the width. The last
    block has no ReLU. The output is tanh / 2 + 1/2. The convolutions have no bias, because BatchNorm would remove it.
    Images whose sides are not divisible by the pools are padded at the lower and right border, and the map is cropped.

    Source: Nguyen & Tran, "Input-Aware Dynamic Backdoor Attack" (2020), appendix.

    Attributes:
        out_channels: Channels C' of the maps.
        widths: Channels of the levels down.
    """

    out_channels: int
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Computes maps, float32 [B, H, W, C'], of images [B, H, W, C]. `train` uses the statistics of this batch."""

        def block(x: jax.Array, channels: int, relu: bool = True) -> jax.Array:
            x = conv(channels, 3, 1, dtype=jnp.float32, use_bias=False)(x)
            # The authors' momentum 0.05 is what Flax calls 0.95.
            x = nn.BatchNorm(use_running_average=not train, momentum=0.95, epsilon=1e-5)(x)
            return nn.relu(x) if relu else x

        _, height, width, _ = images.shape
        multiple = 2 ** len(self.widths)
        x = jnp.pad(images, ((0, 0), (0, -height % multiple), (0, -width % multiple), (0, 0)), mode='edge')
        for channels in self.widths:
            x = max_pool(block(block(x, channels), channels))
        x = block(x, self.widths[-1])
        for width_in, width_out in zip(self.widths[:0:-1], self.widths[-2::-1], strict=True):
            x = block(block(upsample_bilinear(x), width_in), width_out)
        x = block(block(upsample_bilinear(x), self.widths[0]), self.out_channels, relu=False)
        return jnp.tanh(x[:, :height, :width]) / 2 + 0.5


def max_pool(x: jax.Array) -> jax.Array:
    """Computes the maximum of each 2x2 pixels. As a reduction, its gradient is deterministic on a GPU too."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def networks_for(image_shape: tuple[int, int, int]) -> tuple[EncoderDecoder, EncoderDecoder]:
    """Builds the generator and the mask network for images of shape (H, W, C), smaller ones for small grey images."""
    height, width, channels = image_shape
    small = channels == 1 and max(height, width) <= LARGEST_SMALL_IMAGE
    widths = SMALL_WIDTHS if small else WIDTHS
    return EncoderDecoder(channels, widths), EncoderDecoder(1, widths)
