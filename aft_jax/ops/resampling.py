"""Sampling of images at fractional positions, vectorised over the batch.

These are torch's operations, which the authors of the attacks used. `jax.image.resize` cannot replace them: it has no
align_corners, and its cubic kernel has a = -0.5.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Parameter of the cubic convolution kernel of torch and OpenCV (Keys, 1981, has -0.5).
CUBIC_A = -0.75


def sample_bilinear(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Samples images bilinearly, with black outside the frame.

    Args:
        images: float32 [B, H, W, C].
        rows: float32 [B, h, w], positions in pixels: 0 is the centre of the first row, H - 1 that of the last.
        columns: float32 [B, h, w], positions in pixels, counted in the same way.

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


def sample_field(images: jax.Array, field: jax.Array) -> jax.Array:
    """Samples images bilinearly at normalised positions: torch's grid_sample with align_corners=True, zero padding.

    Args:
        images: float32 [B, H, W, C].
        field: float32 [B, h, w, 2], (column, row) of each sample; -1 is the centre of the first pixel, 1 of the last.

    Returns:
        float32 [B, h, w, C].
    """
    _, height, width, _ = images.shape
    columns = (field[..., 0] + 1) / 2 * (width - 1)
    rows = (field[..., 1] + 1) / 2 * (height - 1)
    return sample_bilinear(images, rows, columns)


def upsample_bilinear(images: jax.Array) -> jax.Array:
    """Doubles the size of images: torch's bilinear interpolation with align_corners=False.

    A new pixel lies a quarter of an old pixel from its nearest neighbour, so the weights are 3/4 and 1/4. Beyond the
    border the border pixels are repeated.

    Args:
        images: float [B, H, W, C].

    Returns:
        The same dtype, [B, 2H, 2W, C].
    """
    for axis in (1, 2):
        size = images.shape[axis]
        first, last = (jax.lax.slice_in_dim(images, i, i + 1, axis=axis) for i in (0, size - 1))
        before = jnp.concatenate([first, jax.lax.slice_in_dim(images, 0, size - 1, axis=axis)], axis)
        after = jnp.concatenate([jax.lax.slice_in_dim(images, 1, size, axis=axis), last], axis)
        pairs = jnp.stack([0.75 * images + 0.25 * before, 0.75 * images + 0.25 * after], axis + 1)
        images = pairs.reshape(*images.shape[:axis], 2 * size, *images.shape[axis + 1 :])
    return images


def upsample_bicubic(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes images: torch's bicubic interpolation with align_corners=True and a = -0.75.

    It uses NumPy and float64, so that a trigger made from a seed is the same on every machine.

    Args:
        images: float [B, h, w, C].
        height: New height H.
        width: New width W.

    Returns:
        float64 [B, H, W, C].
    """
    rows, columns = bicubic_weights(images.shape[1], height), bicubic_weights(images.shape[2], width)
    return np.einsum('Hh,bhwc,Ww->bHWc', rows, images.astype(np.float64), columns)


def bicubic_weights(old: int, new: int) -> np.ndarray:
    """Computes float64 [new, old]: the weight of each old pixel of a line in each new pixel, with corners aligned."""
    positions = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
    nearest = np.floor(positions)
    weights = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        taps = nearest + offset
        index = np.clip(taps, 0, old - 1).astype(np.int64)
        np.add.at(weights, (np.arange(new), index), _cubic(np.abs(positions - taps)))
    return weights


def _cubic(distance: np.ndarray) -> np.ndarray:
    a, d = CUBIC_A, distance
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))
