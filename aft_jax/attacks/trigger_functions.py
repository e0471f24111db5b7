"""Functions that put random triggers on images: (arrays, images) -> images, float32 [B, H, W, C] in [0, 1].

Each is pure and treats every image alone. `random_trigger` draws the arrays.
"""

import jax
import jax.numpy as jnp

from aft_jax.ops.resampling import sample_field


def paste(arrays: dict, images: jax.Array) -> jax.Array:
    """Moves images [B, H, W, C] towards arrays['pattern'] [H, W, C] by the share arrays['opacity'] [H, W, 1]."""
    return images + arrays['opacity'][None] * (arrays['pattern'][None] - images)


def invert(arrays: dict, images: jax.Array) -> jax.Array:
    """Moves images [B, H, W, C] towards their negative by the share arrays['opacity'] [H, W, 1]."""
    return images + arrays['opacity'][None] * (1 - 2 * images)


def add(arrays: dict, images: jax.Array) -> jax.Array:
    """Adds arrays['pattern'] [H, W, C] to images [B, H, W, C], within [0, 1]."""
    return jnp.clip(images + arrays['pattern'][None], 0.0, 1.0)


def scale(arrays: dict, images: jax.Array) -> jax.Array:
    """Multiplies the channels of images [B, H, W, C] by arrays['gain'] [C] and adds arrays['offset'] [C]."""
    gain, offset = arrays['gain'][None, None, None], arrays['offset'][None, None, None]
    return jnp.clip(images * gain + offset, 0.0, 1.0)


def gamma(arrays: dict, images: jax.Array) -> jax.Array:
    """Raises images [B, H, W, C] to the power arrays['gamma']."""
    return jnp.clip(images, 0.0, 1.0) ** arrays['gamma']


def filter_gaussian(arrays: dict, images: jax.Array) -> jax.Array:
    """Moves images [B, H, W, C] towards their blurred copies by arrays['amount']; a negative amount sharpens."""
    rows, columns = arrays['rows'], arrays['columns']
    blurred = jnp.einsum('ih,bhwc,jw->bijc', rows, images, columns, precision='highest')
    return jnp.clip(images + arrays['amount'] * (blurred - images), 0.0, 1.0)


def quantise(arrays: dict, images: jax.Array) -> jax.Array:
    """Rounds images [B, H, W, C] to arrays['levels'] evenly spaced values."""
    steps = arrays['levels'] - 1
    return jnp.round(images * steps) / steps


def resample(arrays: dict, images: jax.Array) -> jax.Array:
    """Samples images [B, H, W, C] at arrays['field'] [H, W, 2], (column, row) in [-1, 1]; black outside the frame."""
    return sample_field(images, jnp.broadcast_to(arrays['field'][None], (*images.shape[:3], 2)))


def paste_variant(arrays: dict, images: jax.Array) -> jax.Array:
    """Pastes one of N patterns into each image [B, H, W, C]: arrays 'pattern' [N, H, W, C], 'opacity' [N, H, W, 1]."""
    chosen = variant(images, len(arrays['pattern']))
    return images + arrays['opacity'][chosen] * (arrays['pattern'][chosen] - images)


def variant(images: jax.Array, count: int) -> jax.Array:
    """Computes which of `count` variants each image [B, H, W, C] gets: int32 [B], from the sum of its stored pixels."""
    stored = jnp.round(images * 255).astype(jnp.int32)
    return stored.sum(axis=(1, 2, 3), dtype=jnp.int32) % count
