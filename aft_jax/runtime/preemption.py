"""SIGTERM, the sign that a machine is about to be taken away: finish the step, save, and go.

A single process watches the signal itself. Processes that work together must stop at the same step, so there JAX's own
service passes the sign on and names the step.
"""

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Watch:
    """Watches for SIGTERM while in a `with`; one for a whole run."""

    def __init__(self) -> None:
        """Watches nothing yet."""
        self._asked = False
        self._before: Any = None
        self._looks = 0

    def __enter__(self) -> 'Watch':
        # Python hands signals to the main thread alone; a program that runs us in another sees to them itself.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def must_stop(self) -> bool:
        """Whether to save and stop now; with several processes, all call it at the same places and get one answer."""
        if jax.process_count() > 1 and not self._asked:
            self._looks += 1
            self._asked = bool(multihost_utils.reached_preemption_sync_point(self._looks))
        return self._asked
