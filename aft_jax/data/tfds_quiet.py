"""Keeps TFDS from talking, and from trying again and again where there is no network."""

import contextlib
import functools
import io
import logging
import os
import sys
from collections.abc import Iterator

from absl import logging as absl_logging

_RETRIES = 2
_TIMEOUT = (10, 60)  # seconds to connect, and between two pieces


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences TFDS, absl, urllib3 and TensorFlow; progress bars stay where someone is watching."""
    import tensorflow_datasets as tfds

    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    # Where preparing imports TensorFlow, it must leave the accelerator's memory to JAX.
    os.environ.setdefault('TF_FORCE_GPU_ALLOW_GROWTH', 'true')
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    urllib3 = logging.getLogger('urllib3')
    levels = absl_logging.get_verbosity(), urllib3.level
    absl_logging.set_verbosity(absl_logging.ERROR)
    urllib3.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl_logging.set_verbosity(levels[0])
        urllib3.setLevel(levels[1])


@contextlib.contextmanager
def fail_fast() -> Iterator[None]:
    """Makes a download give up within seconds; TFDS would try ten times, and wait for ever on a silent host."""
    from tensorflow_datasets.core.download import downloader

    retries, open_url = downloader.MAX_RETRIES, downloader._open_url
    downloader.MAX_RETRIES = _RETRIES
    downloader._open_url = functools.partial(open_url, timeout=_TIMEOUT)
    try:
        yield
    finally:
        downloader.MAX_RETRIES, downloader._open_url = retries, open_url
