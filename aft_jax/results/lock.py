"""The lock of a work directory: two runs at once would both write its files.

The operating system releases the lock when a process ends, however it ends. So the claim of a dead process never has
to be removed by hand.
"""

import contextlib
import errno
import os
import socket
import time
from pathlib import Path
from typing import IO

from aft_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = '.lock'
LONGEST_TEXT = 200
# A network file system keeps the lock of a machine that was taken away until its lease ends, 90 seconds by default.
OTHER_MACHINE_SECONDS = 120.0
POLL_SECONDS = 1.0
BOOT_ID = Path('/proc/sys/kernel/random/boot_id')
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
        owner = _wait(file)
    except OSError as error:
        file.close()
        if error.errno in NO_LOCKS:
            return Lock()
        raise
    if owner is not None:
        file.close()
        raise UserError(
            f'{flag}={directory} is in use by another run{f" ({owner})" if owner else ""}; wait until it ends, or name '
            'another directory.'
        )
    with contextlib.suppress(OSError):  # on a full disk; the text is for the message only
        file.truncate(0)
        file.write(f'process {os.getpid()} on {_machine()}')
        file.flush()
    return Lock(file)


def _wait(file: IO[str]) -> str | None:
    """Locks a file, and waits for a while if a process of another machine holds it.

    Returns:
        None if this process has the lock now, else the text of the process that has it.
    """
    end = time.monotonic() + OTHER_MACHINE_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        file.seek(0)
        owner = file.read(LONGEST_TEXT).strip()
        if not owner or owner.endswith(f' on {_machine()}') or time.monotonic() > end:
            return owner
        time.sleep(POLL_SECONDS)


def _machine() -> str:
    """Names this machine. A pod may have the name of the one before it, so the start of the system is named too."""
    try:
        return f'{socket.gethostname()}, boot {BOOT_ID.read_text()[:8]}'
    except OSError:
        return socket.gethostname()
