"""Context managers that keep TFDS quiet, fast to fail without a network, and its temporary files together."""

import contextlib
import functools
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator

from absl import logging as absl_logging

_RETRIES = 2
_TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of a download


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences TFDS, absl, urllib3 and TensorFlow; progress bars stay on a terminal."""
    import tensorflow_datasets as tfds

    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    # Preparing may import TensorFlow, which must leave the accelerator's memory to JAX.
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
def removes_temporary_files() -> Iterator[None]:
    """Removes the temporary files that TFDS creates in the `with` block.

    For every data set that is not prepared yet, TFDS 4.9.10 creates a folder for the information in its bucket
    (`DatasetInfo.initialize_from_bucket`), and never removes the folder.
    """
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix='aft_jax-tfds-') as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before


@contextlib.contextmanager
def fail_fast() -> Iterator[None]:
    """Makes a download give up within seconds. By default TFDS tries ten times, and waits forever for a silent host.

    TFDS 4.9.10 has no option for either. This function may go with a version of TFDS that has; a test fails when the
    private names are no longer there.
    """
    from tensorflow_datasets.core.download import downloader

    retries, open_url = downloader.MAX_RETRIES, downloader._open_url
    downloader.MAX_RETRIES = _RETRIES
    downloader._open_url = functools.partial(open_url, timeout=_TIMEOUT)
    try:
        yield
    finally:
        downloader.MAX_RETRIES, downloader._open_url = retries, open_url
