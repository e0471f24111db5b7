"""Layers that the classifiers share."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from aft_jax.models.convolution import convolve


def batch_norm(x: jax.Array, *, train: bool, dtype: Any, name: str | None = None) -> jax.Array:
    """BatchNorm over all axes but the last, computed in float32, returned in `dtype`.

    Flax keeps 0.9 of the old statistics, which torch writes as momentum 0.1.
    """
    norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=jnp.float32, name=name)
    return norm(x.astype(jnp.float32)).astype(dtype)


def conv(channels: int, kernel: int, stride: int, *, dtype: Any, use_bias: bool, name: str | None = None) -> nn.Conv:
    """A square convolution, padded as in torch with padding=(kernel - 1) // 2 on every side."""
    margin = (kernel - 1) // 2
    return nn.Conv(
        channels,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((margin, margin), (margin, margin)),
        use_bias=use_bias,
        conv_general_dilated=convolve,
        dtype=dtype,
        name=name,
    )


def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...], dtype: Any) -> jax.Array:
    """Returns (images - mean) / std in `dtype`; mean and std have one value or one a channel."""
    channels = images.shape[-1]
    mean_array = jnp.broadcast_to(jnp.asarray(mean, jnp.float32), (channels,))
    std_array = jnp.broadcast_to(jnp.asarray(std, jnp.float32), (channels,))
    return ((images - mean_array[None, None, None, :]) / std_array[None, None, None, :]).astype(dtype)
