"""Fashion-MNIST: from the system's own IDX files where it has them, else from TFDS."""

import os
from typing import Any

from aft_jax.data import idx, tfds_source
from aft_jax.data.dataset import Dataset

DEBIAN_FOLDER = '/usr/share/datasets/fashion-mnist'  # of the package dataset-fashion-mnist


def load(options: Any) -> Dataset:
    """Loads Fashion-MNIST: 60,000 training and 10,000 test images.

    Args:
        options: As in `aft_jax.data.load`. `idx_dir`, or Debian's folder where it exists, is preferred to a download.

    Returns:
        The data set; images are uint8 [N, 28, 28, 1] unless `options.size` says otherwise.

    Raises:
        UserError: If `idx_dir` lacks a file or has a damaged one; without such files, as in `tfds_source.load`.
    """
    folder = os.path.expanduser(options.idx_dir) or (DEBIAN_FOLDER if os.path.isdir(DEBIAN_FOLDER) else '')
    if not folder:
        return tfds_source.load('fashion_mnist', options)
    tfds_source.require_tfds('fashion_mnist')
    from aft_jax.data import builders

    config = builders.IdxConfig(name=idx.fingerprint(folder), folder=folder)
    return tfds_source.load_own(
        'fashion_mnist',
        lambda **kwargs: builders.FashionMnistIdx(config=config, **kwargs),
        lambda: idx.read_splits(folder),
        options,
    )
