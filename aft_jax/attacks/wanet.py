"""WaNet: a smooth, fixed warp (Nguyen & Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", 2021).

    grid    P ~ U(-1, 1) [k, k, 2], divided by mean |P|
    field   clip(identity + strength * upsampled P / H, -1, 1), identity = positions of the pixels in [-1, 1]
    x'      x sampled at the field

In noise mode every pixel of the field moves by a further U(-1, 1) / H, with new noise for each image. The label stays
true, so that the classifier learns this one field and not warping in general. In images that are not square, H is the
length of the axis along which a sample moves. The shift in pixels is then the same along both axes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aft_jax.attacks.attack import Attack
from aft_jax.errors import UserError
from aft_jax.ops.resampling import sample_field, upsample_bicubic
from aft_jax.randomness import generator_for


class WanetOptions(NamedTuple):
    """Section `attack.wanet` of the config, without the cross_ratio (see `aft_jax.attacks.poison`).

    Attributes:
        grid: Points of the grid along each axis, k in the paper.
        strength: Strength of the warp, s in the paper.
    """

    grid: int
    strength: float


def build(options: WanetOptions, target_map: np.ndarray, image_shape: tuple[int, int, int], seed: int) -> Attack:
    """Builds the attack, with a grid that is drawn from the seed.

    Args:
        options: Size of the grid and strength of the warp.
        target_map: int32 [K], target label of each true class.
        image_shape: (H, W, C).
        seed: Seed of the experiment.

    Raises:
        UserError: The grid is finer than the image.
    """
    height, width, _ = image_shape
    if options.grid > min(height, width):
        raise UserError(
            f'attack.wanet.grid={options.grid} is finer than images of {height}x{width}; lower it to at most '
            f'{min(height, width)}.'
        )
    grid = generator_for(seed, 'attack/wanet').uniform(-1, 1, (options.grid, options.grid, 2))
    grid = (grid / np.abs(grid).mean()).astype(np.float32)
    arrays = {'grid': grid, 'field': warping_field(grid, options.strength, height, width)}
    return Attack('wanet', target_map, arrays, warp, warp_with_noise)


def warping_field(grid: np.ndarray, strength: float, height: int, width: int) -> np.ndarray:
    """Computes the sampling field from a grid [k, k, 2].

    Returns:
        float32 [H, W, 2], the (column, row) in [-1, 1] from which each pixel is sampled.
    """
    columns, rows = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    flow = upsample_bicubic(grid[None], height, width)[0] / np.array([width, height])
    return np.clip(np.stack([columns, rows], axis=-1) + strength * flow, -1, 1).astype(np.float32)


def warp(arrays: dict, images: jax.Array) -> jax.Array:
    """Samples the images [B, H, W, C] at arrays['field'] [H, W, 2]."""
    return sample_field(images, jnp.broadcast_to(arrays['field'][None], (*images.shape[:3], 2)))


def warp_with_noise(arrays: dict, images: jax.Array, others: jax.Array, key: jax.Array) -> jax.Array:
    """Samples the images [B, H, W, C] in noise mode; `others` is not used."""
    del others
    _, height, width, _ = images.shape
    noise = jax.random.uniform(key, (*images.shape[:3], 2), jnp.float32, -1.0, 1.0)
    noise = noise / jnp.array([width, height], jnp.float32)[None, None, None, :]
    return sample_field(images, jnp.clip(arrays['field'][None] + noise, -1.0, 1.0))
