"""The lock of a work directory: two runs at once would both write its files.

The operating system releases the lock when a process ends, however it ends. So the claim of a dead process never has
to be removed by hand.
"""

import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import IO

from aft_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = '.lock'
# Errors of file systems that know no locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS}


class Lock:
    """A held lock; a context manager that releases it."""

    def __init__(self, file: IO[str] | None = None):
        """Creates the lock from its open and locked file; None for a process that only reads."""
        self._file = file

    def __enter__(self) -> 'Lock':
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def lock(directory: Path, flag: str, name: str = NAME) -> Lock:
    """Locks a directory for this process.

    Args:
        directory: Directory; it exists.
        flag: Name of the flag that named the directory, for the message.
        name: Name of the lock file, which stays in the directory.

    Raises:
        UserError: Another process holds the lock.
        OSError: The file cannot be written.
    """
    if fcntl is None:
        return Lock()
    file = (directory / name).open('a+', encoding='utf-8')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with file:
            if error.errno in NO_LOCKS:
                return Lock()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            file.seek(0)
            owner = file.read(200).strip()
        raise UserError(
            f'{flag}={directory} is in use by another run{f" ({owner})" if owner else ""}; wait until it ends, or name '
            'another directory.'
        ) from None
    with contextlib.suppress(OSError):  # on a full disk; the text is for the message only
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
    return Lock(file)
