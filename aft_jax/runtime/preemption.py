"""Reaction to SIGTERM, which announces that a machine is about to be taken away: finish the step, save, and exit.

A single process handles the signal itself. The processes of one job must stop at the same step. There JAX's preemption
service forwards the signal and chooses the step.
"""

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
    """The run was stopped by SIGTERM. Its state is saved, and the same command resumes it."""


class Watch:
    """A context manager that watches for SIGTERM; one serves a whole run."""

    def __init__(self) -> None:
        """Creates a watch that starts with the `with` block."""
        self._stopping = False
        self._handler_before: Any = None
        self._num_checks = 0

    def __enter__(self) -> 'Watch':
        # Only the main thread may handle signals. A program that calls this in another thread handles them itself.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler_before is not None:
            signal.signal(signal.SIGTERM, self._handler_before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def must_stop(self) -> bool:
        """Returns whether to save and stop now.

        With several processes, all of them call it at the same places, and all get the same answer.
        """
        if jax.process_count() > 1 and not self._stopping:
            self._num_checks += 1
            self._stopping = bool(multihost_utils.reached_preemption_sync_point(self._num_checks))
        return self._stopping
