"""triggers.png: the effect of triggers on images, with the difference magnified, as in the papers of the attacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MAGNIFICATION = 5
# Smallest side of an image in a mosaic, and the gap between images; pixels.
SMALLEST_SIDE, GAP = 64, 4


def write_gallery(path: Path, shown: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Draws the gallery and writes it as PNG.

    Args:
        path: Path of the PNG.
        shown: Clean and triggered images by the attack's name, both uint8 [k, H, W, C].
    """
    figure = draw(shown)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw(shown: dict[str, tuple[np.ndarray, np.ndarray]]) -> Any:
    """Draws a Matplotlib figure with a row for each attack: each image clean, triggered, and the difference.

    Grey means no difference.
    """
    from matplotlib.figure import Figure

    count = max(len(clean) for clean, _ in shown.values())
    figure = Figure(figsize=(1.3 * 3 * count, 1.45 * len(shown) + 0.3), layout='constrained')
    axes = figure.subplots(len(shown), 3 * count, squeeze=False)
    for row, (name, (clean, triggered)) in enumerate(shown.items()):
        for image in range(count):
            pictures = {
                'clean': clean[image],
                'triggered': triggered[image],
                f'difference x{MAGNIFICATION}': magnified_difference(clean[image], triggered[image]),
            }
            for column, (title, picture) in enumerate(pictures.items()):
                axis = axes[row, 3 * image + column]
                axis.imshow(picture[..., 0] if picture.shape[-1] == 1 else picture, cmap='gray', vmin=0, vmax=255)
                axis.set_xticks([])
                axis.set_yticks([])
                if row == 0:
                    axis.set_title(title, fontsize=9)
        axes[row, 0].set_ylabel(name, fontsize=10)
    return figure


def magnified_difference(clean: np.ndarray, triggered: np.ndarray) -> np.ndarray:
    """Computes 128 + MAGNIFICATION * (triggered - clean), uint8 [H, W, C], for uint8 images [H, W, C]."""
    difference = triggered.astype(np.int32) - clean.astype(np.int32)
    return np.clip(128 + MAGNIFICATION * difference, 0, 255).astype(np.uint8)


def mosaic(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Arranges images in rows as one image, uint8 [height, width, C]. Small images are enlarged.

    Args:
        rows: Images of each row, uint8 [k, H, W, C], all of one shape.
    """
    images = np.stack(rows)
    scale = -(-SMALLEST_SIDE // min(images.shape[2:4]))
    images = images.repeat(scale, axis=2).repeat(scale, axis=3)
    images = np.pad(images, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    count, columns, height, width, channels = images.shape
    whole = images.transpose(0, 2, 1, 3, 4).reshape(count * height, columns * width, channels)
    return whole[:-GAP, :-GAP]


def read(path: Path) -> np.ndarray:
    """Reads a picture as uint8 [H, W, 3]."""
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert('RGB'))
