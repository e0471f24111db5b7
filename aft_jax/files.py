"""Files of a work directory: atomic writing, damaged files, and storage that cannot be written.

Writing is atomic: after a crash a file has its old content or the new one, never a part.
"""

import contextlib
import errno
import io
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aft_jax.errors import Preempted, UserError

log = logging.getLogger(__name__)
# Size of the file that `fault` tries to write.
PROBE_BYTES = 2**16
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically: a reader finds the old content or the new one, never a part."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f'.{path.name}.', delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except OSError:
            with contextlib.suppress(OSError):  # the folder may be gone
                os.unlink(file.name)
            raise


def write_text(path: Path, content: str) -> None:
    """Writes text atomically."""
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + '\n')


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a compressed .npz file atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)  # type: ignore[arg-type]  # names are not options
    write_bytes(path, buffer.getvalue())


def set_aside(path: Path, reason: str) -> None:
    """Renames a damaged file or folder to NAME.damaged, or NAME.damaged-1 and so on, with a warning.

    Args:
        path: File or folder.
        reason: What is wrong with it, for the warning.
    """
    names = itertools.chain([f'{path.name}.damaged'], (f'{path.name}.damaged-{i}' for i in itertools.count(1)))
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    path.rename(aside)
    log.warning('%s is damaged (%s) and was renamed to %s.', path, reason, aside.name)


def fault(directory: Path, error: BaseException | None = None) -> str:
    """Finds out why a directory cannot be written; '' if nothing is wrong with it.

    Args:
        directory: Directory.
        error: Exception to look at too. A full disk may have space again a moment later.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in FULL:
            return f'{os.strerror(cause.errno)}'
        for number in FULL:
            if os.strerror(number) in str(cause):
                return os.strerror(number)
        cause = cause.__cause__ or cause.__context__
    try:
        with tempfile.TemporaryFile(dir=directory, prefix='.probe.', buffering=0) as file:
            file.write(bytes(PROBE_BYTES))
    except OSError as problem:
        return str(problem.strerror)
    return ''


@contextlib.contextmanager
def explained(claim: Path) -> Iterator[None]:
    """Raises a UserError in place of an error whose reason is that a directory cannot be written.

    Args:
        claim: File that the directory has as long as nobody removes it.
    """
    try:
        yield
    except (UserError, Preempted):
        raise
    except Exception as error:
        if not claim.exists():
            raise UserError(f'{claim.parent} was removed during the run; start it again in a new directory.') from error
        reason = fault(claim.parent, error)
        if not reason:
            raise
        raise UserError(
            f'{claim.parent} can no longer be written ({reason}); all that was saved is there: correct this, and the '
            'same command continues.'
        ) from error
