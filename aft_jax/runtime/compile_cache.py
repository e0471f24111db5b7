"""Compiled programs kept on disk, so that a second start need not compile them again."""

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from aft_jax.errors import UserError, user_path


def use(directory: str) -> None:
    """Keeps every program compiled from now on in `directory`, and takes it from there when it is found.

    Args:
        directory: Made when it is not there; '' leaves JAX's own settings (JAX_COMPILATION_CACHE_DIR) alone.

    Raises:
        UserError: It cannot be written.
    """
    if not directory:
        return
    path = user_path(directory, 'run.compile_cache').absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'run.compile_cache={directory} cannot be made ({error.strerror}); name another.') from error
    if not os.access(path, os.W_OK):
        raise UserError(f'run.compile_cache={directory} cannot be written; name another directory.')
    _point_to(path)


def _point_to(path: Path) -> None:
    if jax.config.values['jax_compilation_cache_dir'] == str(path):
        return
    jax.config.update('jax_compilation_cache_dir', str(path))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    reset_cache()  # JAX looks at the setting once, at its first compilation
