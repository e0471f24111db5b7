"""Sampling images at fractional positions, vectorised over the batch."""

import jax
import jax.numpy as jnp


def sample_bilinear(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Returns bilinear samples of the images, with black outside the frame.

    Args:
        images: float32 [B, H, W, C].
        rows: float32 [B, h, w], positions in pixels: 0 is the centre of the first row, H - 1 that of the last.
        columns: float32 [B, h, w], likewise.

    Returns:
        float32 [B, h, w, C].
    """
    batch, height, width, channels = images.shape
    flat = images.reshape(batch, height * width, channels)
    top, left = jnp.floor(rows), jnp.floor(columns)

    def tap(row: jax.Array, column: jax.Array) -> jax.Array:
        inside = (row >= 0) & (row <= height - 1) & (column >= 0) & (column <= width - 1)
        weight = jnp.where(inside, (1 - jnp.abs(rows - row)) * (1 - jnp.abs(columns - column)), 0.0)
        row_index = jnp.clip(row, 0, height - 1).astype(jnp.int32)
        column_index = jnp.clip(column, 0, width - 1).astype(jnp.int32)
        index = (row_index * width + column_index).reshape(batch, -1, 1)
        values = jnp.take_along_axis(flat, index, axis=1).reshape(*rows.shape, channels)
        return values * weight[..., None]

    return tap(top, left) + tap(top, left + 1) + tap(top + 1, left) + tap(top + 1, left + 1)
