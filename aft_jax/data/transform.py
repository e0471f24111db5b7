"""Resizing, padding and stacking of pictures into one array."""

from collections.abc import Iterable

import numpy as np
from PIL import Image

from aft_jax.errors import UserError


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes one picture to a square, bilinearly; a smaller one is antialiased.

    Args:
        image: uint8 [H, W, C], C in {1, 3}.
        size: Side in pixels; 0 keeps the picture's size.

    Returns:
        uint8 [size, size, C]. A picture that is not square is stretched.
    """
    height, width, channels = image.shape
    if size == 0 or (height, width) == (size, size):
        return image
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)).reshape(size, size, channels)


def stack(images: Iterable[np.ndarray], count: int, size: int, source: str) -> np.ndarray:
    """Resizes pictures and copies them into one array, with at most one picture in memory besides the array.

    Args:
        images: `count` pictures, uint8 [H, W, C], of any sizes but with the same C.
        count: Number of pictures, at least 1.
        size: Side in pixels, or 0; see `resize`.
        source: Name of the pictures for error messages, such as "folder '/data/mine'".

    Returns:
        uint8 [count, H, W, C].

    Raises:
        UserError: If the pictures differ in size and `size` is 0.
    """
    stacked: np.ndarray | None = None
    for index, image in enumerate(images):
        image = resize(image, size)
        if stacked is None:
            stacked = np.empty((count, *image.shape), np.uint8)
        if image.shape != stacked.shape[1:]:
            one, other = (f'{width}x{height}' for height, width, _ in (stacked.shape[1:], image.shape))
            raise UserError(
                f'The pictures of {source} differ in size ({one} and {other}, for example): '
                'give the size of all pictures, such as --config.data.size=32.'
            )
        stacked[index] = image
    if stacked is None or index + 1 != count:
        raise ValueError(f'{source} should have {count} pictures')
    return stacked


def pad_and_repeat(images: np.ndarray, pad: int, rgb: bool) -> np.ndarray:
    """Adds a border of zeros, then repeats grey to three channels.

    Args:
        images: uint8 [N, H, W, C], C in {1, 3}.
        pad: Pixels added on every side.
        rgb: Whether one channel becomes three; three stay three.

    Returns:
        uint8 [N, H + 2 pad, W + 2 pad, 3 if rgb else C].
    """
    if pad:
        images = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    if rgb and images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)
    return images
