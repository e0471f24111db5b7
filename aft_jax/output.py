"""Standard output and standard error that are never a reason to lose a run.

A pipe whose reader has left, a closed terminal, a full disk, and a character that the locale does not have raise errors
wherever a line is printed. Here such a line is dropped, and the first error is kept.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class Output:
    """A text stream whose errors are kept in `error`."""

    def __init__(self, stream: Any):
        """Creates the stream from the one that it writes to; Python has None for one that was closed from the start."""
        self._stream = io.StringIO() if stream is None else stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes text. Characters that the encoding of the stream does not have are escaped."""
        if self.error is None:
            encoding = getattr(self._stream, 'encoding', None) or 'utf-8'
            with self._kept():
                self._stream.write(text.encode(encoding, 'backslashreplace').decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered."""
        if self.error is None:
            with self._kept():
                self._stream.flush()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error
            # Python writes the buffer once more when it ends, and would report the same error again.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextlib.contextmanager
def tolerant() -> Iterator[None]:
    """Replaces sys.stdout and sys.stderr by streams that raise no errors, and flushes them at the end."""
    for descriptor in (1, 2):
        _open_if_closed(descriptor)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Output(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _open_if_closed(descriptor: int) -> None:
    """Opens a closed file descriptor (>&-) on nothing. Otherwise the next file gets it, with messages of libraries."""
    try:
        os.fstat(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
