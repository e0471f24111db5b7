"""The value that every data source produces."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A labelled image data set in memory.

    Attributes:
        name: Name in `config.dataset`, such as 'mnist5k' or 'npz:/data/mine.npz'.
        train_images: uint8 [N, H, W, C], C in {1, 3}.
        train_labels: int32 [N], in [0, K).
        test_images: uint8 [M, H, W, C].
        test_labels: int32 [M], in [0, K).
        class_names: Names of the K classes, in the order of the labels.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The four arrays: training images and labels, then test images and labels."""
        return self.train_images, self.train_labels, self.test_images, self.test_labels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels
