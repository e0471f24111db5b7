"""Random shift, flip, rotation and CutMix of a batch, on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from aft_jax.ops.resampling import sample_bilinear


class AugmentOptions(NamedTuple):
    """Section `augment` of the config.

    Attributes:
        crop: Largest shift in pixels, as of a random crop of the padded image. 0 for none.
        flip: Whether half of the images are mirrored left to right.
        rotation: Largest angle in degrees, in either direction. 0 for none.
    """

    crop: int
    flip: bool
    rotation: float


def augment(key: jax.Array, images: jax.Array, options: AugmentOptions) -> jax.Array:
    """Shifts, mirrors and rotates each image at random. Pixels from outside the frame are black.

    Args:
        key: PRNG key of this batch.
        images: float32 [B, H, W, C].
        options: Largest changes.

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
    """Pastes a rectangle of its neighbour in the (shuffled) batch into each image.

    The rectangle has the aspect ratio of the image and a uniformly drawn position. Its share of the area is uniform
    between 0 and `largest`.

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features" (2019).
    There, rectangles may cross the border of the image.

    Args:
        key: PRNG key of this batch.
        images: float32 [B, H, W, C].
        largest: Largest share of the area, in [0, 1].

    Returns:
        float32 [B, H, W, C].
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
