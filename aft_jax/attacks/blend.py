"""Blend: a faint picture over the whole image (Chen et al., "Targeted Backdoor Attacks on Deep Learning", 2017)."""

from typing import NamedTuple

import jax
import numpy as np

from aft_jax.attacks.attack import Attack
from aft_jax.errors import UserError, user_path
from aft_jax.randomness import generator_for


class BlendOptions(NamedTuple):
    """Section `attack.blend` of the config.

    Attributes:
        alpha: Opacity of the pattern, in (0, 1].
        pattern_path: Path of a picture, which is resized. '' draws uniform noise from the seed.
    """

    alpha: float
    pattern_path: str


def build(options: BlendOptions, target_map: np.ndarray, image_shape: tuple[int, int, int], seed: int) -> Attack:
    """Builds the attack: x' = (1 - alpha) x + alpha pattern.

    Args:
        options: Pattern and its opacity.
        target_map: int32 [K], target label of each true class.
        image_shape: (H, W, C).
        seed: Seed of the experiment.

    Raises:
        UserError: The picture cannot be read.
    """
    if options.pattern_path:
        pattern = _read_picture(options.pattern_path, image_shape)
    else:
        pattern = generator_for(seed, 'attack/blend').random(image_shape, np.float32)
    return Attack('blend', target_map, {'pattern': pattern, 'alpha': np.float32(options.alpha)}, blend)


def blend(arrays: dict, images: jax.Array) -> jax.Array:
    """Computes (1 - alpha) images + alpha pattern for images [B, H, W, C] and a pattern [H, W, C]."""
    return (1 - arrays['alpha']) * images + arrays['alpha'] * arrays['pattern'][None]


def _read_picture(path: str, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Reads a picture as float32 [H, W, C] in [0, 1], resized to the shape of the images."""
    from PIL import Image

    height, width, channels = image_shape
    try:
        with Image.open(user_path(path, 'attack.blend.pattern_path')) as picture:
            resized = picture.convert('L' if channels == 1 else 'RGB').resize(
                (width, height), Image.Resampling.BILINEAR
            )
    except OSError as error:
        raise UserError(f'attack.blend.pattern_path={path} cannot be read as a picture ({error}).') from error
    return np.asarray(resized, np.float32).reshape(image_shape) / 255
