"""triggers.png: what a trigger does to an image, with the difference magnified, as the attacks' papers show it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

MAGNIFICATION = 5
# Of an image in a mosaic, in pixels, at least.
SMALLEST_SIDE, GAP = 64, 4


def write_gallery(path: Path, shown: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Draws one row an attack: each image clean, triggered, and the difference (grey is none).

    Args:
        path: Of the PNG.
        shown: By the attack's name, clean and triggered images, both uint8 [k, H, W, C].
    """
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    count = max(len(clean) for clean, _ in shown.values())
    figure, axes = plt.subplots(
        len(shown), 3 * count, figsize=(1.3 * 3 * count, 1.45 * len(shown) + 0.3), squeeze=False, layout='constrained'
    )
    for row, (name, (clean, triggered)) in enumerate(shown.items()):
        for image in range(count):
            panels = {
                'clean': clean[image],
                'triggered': triggered[image],
                f'difference x{MAGNIFICATION}': magnified_difference(clean[image], triggered[image]),
            }
            for column, (title, picture) in enumerate(panels.items()):
                axis = axes[row, 3 * image + column]
                axis.imshow(picture[..., 0] if picture.shape[-1] == 1 else picture, cmap='gray', vmin=0, vmax=255)
                axis.set_xticks([])
                axis.set_yticks([])
                if row == 0:
                    axis.set_title(title, fontsize=9)
        axes[row, 0].set_ylabel(name, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def magnified_difference(clean: np.ndarray, triggered: np.ndarray) -> np.ndarray:
    """Returns 128 + MAGNIFICATION * (triggered - clean), uint8 [H, W, C], for uint8 images [H, W, C]."""
    difference = triggered.astype(np.int32) - clean.astype(np.int32)
    return np.clip(128 + MAGNIFICATION * difference, 0, 255).astype(np.uint8)


def mosaic(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Returns images side by side, a kind a row, small ones enlarged, as one image uint8 [height, width, C].

    Args:
        rows: uint8 [k, H, W, C] each, all of one shape.
    """
    images = np.stack(rows)
    scale = -(-SMALLEST_SIDE // min(images.shape[2:4]))
    images = images.repeat(scale, axis=2).repeat(scale, axis=3)
    images = np.pad(images, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    count, columns, height, width, channels = images.shape
    whole = images.transpose(0, 2, 1, 3, 4).reshape(count * height, columns * width, channels)
    return whole[:-GAP, :-GAP]


def read(path: Path) -> np.ndarray:
    """Returns a picture that was drawn, as uint8 [H, W, 3]."""
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert('RGB'))
