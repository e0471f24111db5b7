"""BadNets: a small fixed patch (Gu et al., "BadNets: Identifying Vulnerabilities in the ML Supply Chain", 2017)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aft_jax.attacks.attack import Attack
from aft_jax.errors import UserError


class BadnetsOptions(NamedTuple):
    """Section `attack.badnets` of the config.

    Attributes:
        pattern: Rows of digits from the top with '/' between them; 0 is black and 1 is white.
        row: Row of the patch's first pixel. A negative one is counted from the bottom: -1 puts the patch's last row
            on the image's last row.
        column: Column of the patch's first pixel. A negative one is counted from the right in the same way.
    """

    pattern: str
    row: int
    column: int


def build(options: BadnetsOptions, target_map: np.ndarray, image_shape: tuple[int, int, int]) -> Attack:
    """Builds the attack: x' = x outside the patch, the pattern inside, in all channels.

    Args:
        options: Pattern and place of the patch.
        target_map: int32 [K], target label of each true class.
        image_shape: (H, W, C).

    Raises:
        UserError: The pattern is malformed or does not fit the image.
    """
    height, width, _ = image_shape
    pattern = parse_pattern(options.pattern)
    row = options.row if options.row >= 0 else height - pattern.shape[0] + 1 + options.row
    column = options.column if options.column >= 0 else width - pattern.shape[1] + 1 + options.column
    if not (0 <= row <= height - pattern.shape[0] and 0 <= column <= width - pattern.shape[1]):
        raise UserError(
            f'attack.badnets: a patch of {pattern.shape[0]}x{pattern.shape[1]} pixels at row={options.row}, '
            f'column={options.column} does not fit images of {height}x{width}; choose another row or column.'
        )
    mask = np.zeros((height, width, 1), np.float32)
    image = np.zeros((height, width, 1), np.float32)
    place = (slice(row, row + pattern.shape[0]), slice(column, column + pattern.shape[1]), 0)
    mask[place] = 1.0
    image[place] = pattern
    return Attack('badnets', target_map, {'mask': mask, 'pattern': image}, stamp)


def stamp(arrays: dict, images: jax.Array) -> jax.Array:
    """Puts arrays['pattern'] on the images [B, H, W, C] wherever arrays['mask'] [H, W, 1] is 1."""
    return jnp.where(arrays['mask'][None] > 0, arrays['pattern'][None], images)


def parse_pattern(text: str) -> np.ndarray:
    """Parses rows such as '001/010/101' into float32 [h, w].

    Raises:
        UserError: The rows are empty, of different lengths, or have other digits.
    """
    rows = text.split('/')
    if not all(rows) or len({len(row) for row in rows}) != 1 or set(text) - set('01/'):
        raise UserError(
            f"attack.badnets.pattern={text!r} must be rows of 0 and 1 of one length, such as '001/010/101'."
        )
    return np.array([[int(digit) for digit in row] for row in rows], np.float32)
