"""TensorBoard's files, written with the parts of tensorboardX that have no thread.

The SummaryWriter of tensorboardX writes in a thread, through a queue of ten events. On a full disk the thread dies, and
the run would wait for the queue forever.
"""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

# Seconds between two moments at which the events are on disk. The last one is at the end of a run.
FLUSH_SECONDS = 120.0


class EventFile:
    """A file of the scalars and pictures of one stage."""

    def __init__(self, directory: Path, first_step: int):
        """Creates a file in `directory`. TensorBoard hides what earlier files of it have from `first_step` on."""
        self._event, self._summary, writer, session = _import_parts()
        directory.mkdir(parents=True, exist_ok=True)
        self._file = writer(str(directory / 'events'))
        self._flushed = time.monotonic()
        self._file.write_event(self._event(step=first_step, session_log=session(status=session.START)))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Writes a scalar."""
        self._add(self._summary.scalar(name, value), step)

    def add_image(self, name: str, image: np.ndarray, step: int) -> None:
        """Writes a picture, uint8 [H, W, C]."""
        self._add(self._summary.image(name, image, dataformats='HWC'), step)

    def _add(self, summary: Any, step: int) -> None:
        self._file.write_event(self._event(summary=summary, step=step, wall_time=time.time()))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is left to disk."""
        self._file.close()


def _import_parts() -> tuple[Any, Any, Any, Any]:
    """Imports tensorboardX without torch. It imports torch where it can, which takes seconds, and works without it."""
    with contextlib.ExitStack() as stack:
        if 'torch' not in sys.modules:
            sys.modules['torch'] = None  # type: ignore[assignment]  # makes `import torch` fail
            stack.callback(sys.modules.pop, 'torch')
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
    return Event, summary, EventsWriter, SessionLog
