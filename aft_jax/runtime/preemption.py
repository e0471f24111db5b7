"""Reaction to SIGTERM, which announces that a machine is about to be taken away: finish the step, save, and exit.

SIGHUP, which a closed terminal sends, does the same, unless it is ignored as under nohup. A single process handles the
signals itself. The processes of one job must stop at the same step. There JAX's preemption service forwards SIGTERM and
chooses the step, and SIGHUP becomes a SIGTERM.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Watch:
    """A context manager that watches for SIGTERM and SIGHUP; one serves a whole run.

    Attributes:
        signal: Name of the signal that stops the run.
    """

    def __init__(self) -> None:
        """Creates a watch that starts with the `with` block."""
        self.signal = 'SIGTERM'
        self._stopping = False
        self._handlers_before: dict[int, Any] = {}
        self._num_checks = 0

    def __enter__(self) -> 'Watch':
        # Only the main thread may handle signals. A program that calls this in another thread handles them itself.
        if threading.current_thread() is not threading.main_thread():
            return self
        alone = jax.process_count() == 1
        handlers = {signal.SIGTERM: self._note} if alone else {}
        hangup = getattr(signal, 'SIGHUP', None)  # Windows has none
        if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
            handlers[hangup] = self._note if alone else _forward
        self._handlers_before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        self._stopping = True

    def must_stop(self) -> bool:
        """Returns whether to save and stop now.

        With several processes, all of them call it at the same places, and all get the same answer.
        """
        if jax.process_count() > 1 and not self._stopping:
            self._num_checks += 1
            self._stopping = bool(multihost_utils.reached_preemption_sync_point(self._num_checks))
        return self._stopping


def _forward(number: int, frame: FrameType | None) -> None:
    """Sends SIGTERM to this process, which JAX's preemption service waits for."""
    os.kill(os.getpid(), signal.SIGTERM)
