"""The small convolutional network of the input-aware and WaNet papers for 28x28 grey images."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from aft_jax.models.layers import batch_norm, conv, normalise


class MnistCNN(nn.Module):
    """Conv 3x3/2, 32; twice [BatchNorm, ReLU, conv 3x3/2, 64]; dense 512; dropout; dense K.

    Source: Nguyen & Tran, "Input-Aware Dynamic Backdoor Attack" (2020), appendix.

    Attributes:
        num_classes: K.
        dropout: Share of the 512 units dropped while training.
        conv_bias: Whether the two inner convolutions have a bias; those of the WaNet paper's release have none.
        mean: Pixel mean, one value or one a channel.
        std: Pixel standard deviation, likewise.
        dtype: Of the computation; parameters are float32.
    """

    num_classes: int
    dropout: float = 0.3
    conv_bias: bool = True
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, features: bool = False):
        x = normalise(images, self.mean, self.std, self.dtype)
        x = nn.relu(conv(32, 3, 2, dtype=self.dtype, use_bias=True)(x))
        stages = [x]
        for _ in range(2):
            x = nn.relu(batch_norm(x, train=train, dtype=self.dtype))
            x = conv(64, 3, 2, dtype=self.dtype, use_bias=self.conv_bias)(x)
            stages.append(x)
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(512, dtype=self.dtype)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)
        return (logits, tuple(stages)) if features else logits
