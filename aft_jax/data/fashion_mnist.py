"""Fashion-MNIST: from IDX files on disk where there are any, else from TFDS."""

import os
from typing import Any

from aft_jax.data import idx, tfds_source
from aft_jax.data.dataset import Dataset

DEBIAN_FOLDER = '/usr/share/datasets/fashion-mnist'  # from the package dataset-fashion-mnist


def load(options: Any) -> Dataset:
    """Loads Fashion-MNIST: 60,000 training and 10,000 test images.

    Args:
        options: Options of `aft_jax.data.load`. `idx_dir`, or else Debian's folder, is preferred to a download.

    Returns:
        The data set; images are uint8 [N, 28, 28, 1], or [N, size, size, 1] with `options.size`.

    Raises:
        UserError: If a file in `idx_dir` is missing or damaged, or if `tfds_source.load` raises one.
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
