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

    Each stage down is two blocks [conv 3x3, BatchNorm, ReLU] and a 2x2 max pool; in the middle stands one block; each
    stage up is a bilinear doubling and two blocks, of which the second changes the width, and the very last one has no
    ReLU. The output is tanh / 2 + 1/2. The convolutions have no bias, which BatchNorm would take away again. An image
    whose sides the pools do not divide is continued beyond its lower and right border, and the map is cut back.

    Source: Nguyen & Tran, "Input-Aware Dynamic Backdoor Attack" (2020), appendix.

    Attributes:
        out_channels: C' of the maps.
        widths: Channels of the stages down.
    """

    out_channels: int
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Returns float32 [B, H, W, C'] for images [B, H, W, C]; with `train`, by the statistics of this batch."""

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
        for here, after in zip(self.widths[:0:-1], self.widths[-2::-1], strict=True):
            x = block(block(upsample_bilinear(x), here), after)
        x = block(block(upsample_bilinear(x), self.widths[0]), self.out_channels, relu=False)
        return jnp.tanh(x[:, :height, :width]) / 2 + 0.5


def max_pool(x: jax.Array) -> jax.Array:
    """Returns the largest of each 2x2 pixels; a reduction, whose gradient is deterministic on a GPU as well."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def networks_for(image_shape: tuple[int, int, int]) -> tuple[EncoderDecoder, EncoderDecoder]:
    """Returns the generator and the mask network for images of shape (H, W, C): smaller ones for small grey images."""
    height, width, channels = image_shape
    small = channels == 1 and max(height, width) <= LARGEST_SMALL_IMAGE
    widths = SMALL_WIDTHS if small else WIDTHS
    return EncoderDecoder(channels, widths), EncoderDecoder(1, widths)
