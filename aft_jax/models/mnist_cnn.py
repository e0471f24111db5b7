"""The small convolutional network of the input-aware and WaNet papers for 28x28 grey images."""

import flax.linen as nn
import jax

from aft_jax.models.classifier import Classifier
from aft_jax.models.layers import batch_norm, conv


class MnistCNN(Classifier):
    """Conv 3x3/2, 32; twice [BatchNorm, ReLU, conv 3x3/2, 64]; dense 512; dropout; dense K.

    Source: Nguyen & Tran, "Input-Aware Dynamic Backdoor Attack" (2020), appendix.

    Attributes:
        dropout: Share of the 512 units dropped while training.
        conv_bias: Whether the two inner convolutions have a bias; those of the WaNet paper's release have none.
    """

    small = True

    dropout: float = 0.3
    conv_bias: bool = True

    def blocks(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Computes three maps, each half the side of the one before."""
        x = nn.relu(conv(32, 3, 2, dtype=self.dtype, use_bias=True)(x))
        block_outputs = [x]
        for _ in range(2):
            x = nn.relu(batch_norm(x, train=train, dtype=self.dtype))
            x = conv(64, 3, 2, dtype=self.dtype, use_bias=self.conv_bias)(x)
            block_outputs.append(x)
        return tuple(block_outputs)

    def head(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes the logits by two dense layers on the flattened map."""
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.Dense(512, dtype=self.dtype)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x)
