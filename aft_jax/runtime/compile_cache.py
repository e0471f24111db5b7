"""JAX's cache of compiled programs on disk, so that a second start does not compile them again."""

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from aft_jax.errors import UserError, user_path


def use(directory: str) -> None:
    """Uses `directory` as the cache of all programs compiled from now on.

    Args:
        directory: Cache directory, created if it does not exist; '' keeps JAX's settings (JAX_COMPILATION_CACHE_DIR).

    Raises:
        UserError: If the directory cannot be written.
    """
    if not directory:
        return
    path = user_path(directory, 'run.compile_cache').absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f'run.compile_cache={directory} cannot be created ({error.strerror}); name another directory.'
        ) from error
    if not os.access(path, os.W_OK):
        raise UserError(f'run.compile_cache={directory} cannot be written; name another directory.')
    _point_to(path)


def _point_to(path: Path) -> None:
    if jax.config.values['jax_compilation_cache_dir'] == str(path):
        return
    jax.config.update('jax_compilation_cache_dir', str(path))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    reset_cache()  # JAX reads the setting only once, at its first compilation
