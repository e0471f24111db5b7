"""Random shift, flip, rotation and CutMix of a batch, on the device."""

import jax
import jax.numpy as jnp
import ml_collections

from aft_jax.ops.resampling import sample_bilinear


def augment(key: jax.Array, images: jax.Array, options: ml_collections.ConfigDict) -> jax.Array:
    """Returns the images, each moved at random; what leaves the frame is gone, what enters it is black.

    Args:
        key: PRNG key of this batch.
        images: float32 [B, H, W, C].
        options: `config.augment`: crop (pixels; a shift by up to so many, as a random crop of the padded image),
            flip (left to right, half of the images), rotation (degrees, up to so many either way).

    Returns:
        float32 [B, H, W, C].
    """
    shift_key, flip_key, angle_key = jax.random.split(key, 3)
    if options.crop:
        images = _shift(shift_key, images, options.crop)
    if options.flip:
        flipped = jax.random.bernoulli(flip_key, 0.5, (images.shape[0], 1, 1, 1))
        images = jnp.where(flipped, images[:, :, ::-1], images)
    if options.rotation:
        images = _rotate(angle_key, images, options.rotation)
    return images


def cut_mix(key: jax.Array, images: jax.Array, largest: float) -> jax.Array:
    """Returns each of the images [B, H, W, C] with a rectangle of its neighbour in the (shuffled) batch.

    The rectangle has the shape of the image, a share of its area that is uniform between 0 and `largest`, and lies
    anywhere.

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features" (2019),
    whose rectangles may reach over the border.
    """
    area_key, rows_key, columns_key = jax.random.split(key, 3)
    count, height, width, _ = images.shape
    side = jnp.sqrt(jax.random.uniform(area_key, (count, 1), jnp.float32, 0.0, largest))

    def inside(key: jax.Array, length: int) -> jax.Array:
        first = jax.random.uniform(key, (count, 1)) * (1 - side)
        centres = (jnp.arange(length, dtype=jnp.float32)[None] + 0.5) / length
        return (centres >= first) & (centres < first + side)

    rectangle = inside(rows_key, height)[:, :, None] & inside(columns_key, width)[:, None, :]
    return jnp.where(rectangle[..., None], jnp.roll(images, 1, axis=0), images)


def _shift(key: jax.Array, images: jax.Array, crop: int) -> jax.Array:
    batch, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (crop, crop), (crop, crop), (0, 0)))
    corners = jax.random.randint(key, (batch, 2), 0, 2 * crop + 1)

    def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

    return jax.vmap(cut)(padded, corners)


def _rotate(key: jax.Array, images: jax.Array, degrees: float) -> jax.Array:
    batch, height, width, _ = images.shape
    angles = jax.random.uniform(key, (batch, 1, 1), jnp.float32, -degrees, degrees) * (jnp.pi / 180)
    rows = (jnp.arange(height, dtype=jnp.float32) - (height - 1) / 2)[None, :, None]
    columns = (jnp.arange(width, dtype=jnp.float32) - (width - 1) / 2)[None, None, :]
    source_rows = jnp.cos(angles) * rows - jnp.sin(angles) * columns + (height - 1) / 2
    source_columns = jnp.sin(angles) * rows + jnp.cos(angles) * columns + (width - 1) / 2
    return sample_bilinear(images, source_rows, source_columns)
