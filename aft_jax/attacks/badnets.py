"""BadNets: a small fixed patch (Gu et al., "BadNets: Identifying Vulnerabilities in the ML Supply Chain", 2017)."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from aft_jax.attacks.attack import Attack
from aft_jax.errors import UserError


def build(options: ml_collections.ConfigDict, target_map: np.ndarray, image_shape: tuple[int, int, int]) -> Attack:
    """Returns the attack: x' = x outside the patch, the pattern inside, in all channels.

    Args:
        options: `config.attack.badnets`: pattern (rows of digits from the top, '/' between them, 0 black and 1
            white), row and column of the patch's first pixel (negative: counted so that -1 puts the patch's last
            pixel on the image's last).
        target_map: int32 [K].
        image_shape: (H, W, C).

    Raises:
        UserError: The pattern is not one, or does not fit the image.
    """
    height, width, _ = image_shape
    pattern = parse_pattern(options.pattern)
    row = options.row if options.row >= 0 else height - pattern.shape[0] + 1 + options.row
    column = options.column if options.column >= 0 else width - pattern.shape[1] + 1 + options.column
    if not (0 <= row <= height - pattern.shape[0] and 0 <= column <= width - pattern.shape[1]):
        raise UserError(
            f'attack.badnets: a patch of {pattern.shape[0]}x{pattern.shape[1]} pixels at row={options.row}, '
            f'column={options.column} does not fit images of {height}x{width}.'
        )
    mask = np.zeros((height, width, 1), np.float32)
    image = np.zeros((height, width, 1), np.float32)
    place = (slice(row, row + pattern.shape[0]), slice(column, column + pattern.shape[1]), 0)
    mask[place] = 1.0
    image[place] = pattern
    return Attack('badnets', target_map, {'mask': mask, 'pattern': image}, stamp)


def stamp(arrays: dict, images: jax.Array) -> jax.Array:
    """Returns the images [B, H, W, C] with arrays['pattern'] wherever arrays['mask'] [H, W, 1] is 1."""
    return jnp.where(arrays['mask'][None] > 0, arrays['pattern'][None], images)


def parse_pattern(text: str) -> np.ndarray:
    """Returns float32 [h, w] for rows such as '001/010/101'."""
    rows = text.split('/')
    if not all(rows) or len({len(row) for row in rows}) != 1 or set(text) - set('01/'):
        raise UserError(f"attack.badnets.pattern={text!r} should be rows of 0 and 1 of one length, as '001/010/101'.")
    return np.array([[int(digit) for digit in row] for row in rows], np.float32)
