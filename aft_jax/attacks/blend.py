"""Blend: a faint picture over the whole image (Chen et al., "Targeted Backdoor Attacks on Deep Learning", 2017)."""

import jax
import ml_collections
import numpy as np

from aft_jax.attacks.attack import Attack
from aft_jax.errors import UserError, user_path
from aft_jax.randomness import generator_for


def build(
    options: ml_collections.ConfigDict, target_map: np.ndarray, image_shape: tuple[int, int, int], seed: int
) -> Attack:
    """Returns the attack: x' = (1 - alpha) x + alpha pattern.

    Args:
        options: `config.attack.blend`: alpha, and pattern_path, a picture that is resized ('' draws uniform noise
            from the seed).
        target_map: int32 [K].
        image_shape: (H, W, C).
        seed: The experiment's seed.

    Raises:
        UserError: The picture cannot be read.
    """
    if options.pattern_path:
        pattern = _read_picture(options.pattern_path, image_shape)
    else:
        pattern = generator_for(seed, 'attack/blend').random(image_shape, np.float32)
    return Attack('blend', target_map, {'pattern': pattern, 'alpha': np.float32(options.alpha)}, blend)


def blend(arrays: dict, images: jax.Array) -> jax.Array:
    """Returns (1 - alpha) images + alpha pattern for images [B, H, W, C] and a pattern [H, W, C]."""
    return (1 - arrays['alpha']) * images + arrays['alpha'] * arrays['pattern'][None]


def _read_picture(path: str, image_shape: tuple[int, int, int]) -> np.ndarray:
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
