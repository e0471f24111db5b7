"""BatchNorm with a gradient in two passes over the images: one for two sums, one for the gradient itself.

`flax.linen.BatchNorm` with XLA's own gradients gives the same result up to rounding, slower on a CPU. There mean and
mean square are differentiated one after the other, so the images are written and read several times more.

Source: Ioffe & Szegedy, "Batch Normalization" (2015), section 3.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm` over all axes but the last, with its fields `momentum` and `epsilon`, in float32.

    Its variables are flax's: 'scale' and 'bias' among 'params', 'mean' and 'var' among 'batch_stats', float32 [C].
    """

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None):
        """Normalises the images.

        Args:
            x: float32 [B, ..., C].
            use_running_average: Whether to normalise by the running statistics (default: the field's value) instead of
                the batch's. The batch's statistics also update the running ones.
            mask: bool [B, 1, ...]; False excludes an image from the batch's statistics.
        """
        average = nn.merge_param('use_running_average', self.use_running_average, use_running_average)
        shape = (x.shape[-1],)
        mean = self.variable('batch_stats', 'mean', jnp.zeros, shape, jnp.float32)
        var = self.variable('batch_stats', 'var', jnp.ones, shape, jnp.float32)
        scale = self.param('scale', nn.initializers.ones, shape, jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, shape, jnp.float32)
        if average:
            return normalised(x, mean.value, var.value, scale, bias, self.epsilon)
        if mask is None:
            y, batch_mean, batch_var = normalised_by_batch(x, scale, bias, self.epsilon)
        else:
            batch_mean, batch_var = moments(x, mask)
            y = normalised(x, batch_mean, batch_var, scale, bias, self.epsilon)
        if not self.is_initializing():
            mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
            var.value = self.momentum * var.value + (1 - self.momentum) * batch_var
        return y


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalised_by_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes (x - mean) / sqrt(var + epsilon) * scale + bias, and mean and variance, all differentiable.

    Args:
        x: float32 [B, ..., C].
        scale: float32 [C].
        bias: float32 [C].
        epsilon: Constant added to the variance.

    Returns:
        float32 [B, ..., C]; mean and variance over all axes but the last, float32 [C].
    """
    mean, var = moments(x)
    return normalised(x, mean, var, scale, bias, epsilon), mean, var


def _forward(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> tuple[Any, Any]:
    y, mean, var = normalised_by_batch(x, scale, bias, epsilon)
    return (y, mean, var), (x, mean, lax.rsqrt(var + epsilon), scale)


def _backward(_: float, saved: Any, gradients: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the gradients. With u = (x - mean) r and r = 1 / sqrt(var + epsilon) they are:

    bias sum(dy), scale sum(dy u), x (dy - mean(dy) - u mean(dy u)) r scale.
    """
    x, mean, r, scale = saved
    of_y, of_mean, of_var = gradients
    axes, count = _axes(x), x.size // x.shape[-1]
    of_bias = of_y.sum(axes)
    of_scale = ((of_y * x).sum(axes) - mean * of_bias) * r
    # The gradient of x is linear in dy and x, with coefficients of C numbers each.
    by_x = (2 * of_var - scale * r * r * of_scale) / count
    constant = (of_mean - scale * r * of_bias) / count - by_x * mean
    wide = partial(_wide, like=x)
    return of_y * wide(scale * r) + x * wide(by_x) + wide(constant), of_scale, of_bias


normalised_by_batch.defvjp(_forward, _backward)


def moments(x: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Computes mean and variance over all axes but the last, float32 [C]; the mask is that of `BatchNorm`."""
    mean, square = (values.mean(_axes(x), where=mask) for values in (x, x * x))
    return mean, jnp.maximum(0.0, square - mean * mean)


def normalised(
    x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
    """Computes (x - mean) / sqrt(var + epsilon) * scale + bias; the last axis of x is that of the other arrays."""
    wide = partial(_wide, like=x)
    return (x - wide(mean)) * wide(lax.rsqrt(var + epsilon) * scale) + wide(bias)


def _axes(x: jax.Array) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))


def _wide(values: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(values, _axes(like))
