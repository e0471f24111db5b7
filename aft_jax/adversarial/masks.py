"""Draws the places of local perturbations: masks of a given area, several for each perturbation to choose from."""

import math

import jax
import jax.numpy as jnp

# Random places that are drawn for each perturbation.
PLACES = 24
# Largest aspect ratio of a rectangle.
LARGEST_RATIO = 12.0
# Points along each side of the coarse and of the fine noise that regions are cut from.
COARSE, FINE = 6, 14


def draw_rectangles(key: jax.Array, areas: jax.Array, height: int, width: int) -> jax.Array:
    """Draws rectangles anywhere in the image, edges included, with sides in any ratio up to `LARGEST_RATIO`.

    Args:
        key: PRNG key.
        areas: float32 [N], shares of the area of an image.
        height: Height of the images.
        width: Width of the images.

    Returns:
        float32 [N, PLACES, H, W] of 0 and 1.
    """
    ratio_key, row_key, column_key = jax.random.split(key, 3)
    shape = (len(areas), PLACES)
    pixels = areas[:, None] * (height * width)
    log_ratio = math.log(LARGEST_RATIO)
    ratio = jnp.exp(jax.random.uniform(ratio_key, shape, jnp.float32, -log_ratio, log_ratio))
    rows = jnp.clip(jnp.round(jnp.sqrt(pixels * ratio)), 1, height)
    columns = jnp.clip(jnp.round(pixels / rows), 1, width)

    def inside(key: jax.Array, length: jax.Array, side: int) -> jax.Array:
        first = jnp.floor(jax.random.uniform(key, shape) * (side - length + 1))[..., None]
        pixel = jnp.arange(side, dtype=jnp.float32)[None, None]
        return (pixel >= first) & (pixel < first + length[..., None])

    mask = inside(row_key, rows, height)[..., :, None] & inside(column_key, columns, width)[..., None, :]
    return mask.astype(jnp.float32)


def draw_regions(key: jax.Array, areas: jax.Array, height: int, width: int) -> jax.Array:
    """Draws regions of one or more parts: the pixels where smooth noise is highest. Arguments as `draw_rectangles`."""
    coarse_key, fine_key, mix_key = jax.random.split(key, 3)
    shape = (len(areas), PLACES)

    def smooth(key: jax.Array, points: int) -> jax.Array:
        noise = jax.random.normal(key, (*shape, points, points), jnp.float32)
        return jax.image.resize(noise, (*shape, height, width), 'cubic')

    mix = jax.random.uniform(mix_key, (*shape, 1, 1), jnp.float32)
    noise = mix * smooth(coarse_key, COARSE) + (1 - mix) * smooth(fine_key, FINE)
    size = height * width
    index = jnp.clip(jnp.round((1 - areas) * size).astype(jnp.int32), 0, size - 1)[:, None, None]
    ordered = jnp.sort(noise.reshape(*shape, size), axis=-1)
    lowest = jnp.take_along_axis(ordered, jnp.broadcast_to(index, (*shape, 1)), axis=-1)
    return (noise >= lowest[..., None]).astype(jnp.float32)
