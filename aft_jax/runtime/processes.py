"""Several processes that are one program: joining them, and agreeing on what went wrong."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from aft_jax.errors import UserError

T = TypeVar('T')
# A process that is gone is missed after so long, and the others end.
HEARTBEAT_SECONDS = 30
MESSAGE_BYTES = 2000


def join(coordinator: str | None, processes: int | None, index: int | None) -> None:
    """Joins the processes of a job, before any device is used.

    Args:
        coordinator: HOST:PORT of process 0; None where JAX finds the job by itself (TPU pods, SLURM, Kubernetes).
        processes: How many there are; None likewise.
        index: Which one this is, from 0; None likewise.

    Raises:
        UserError: There is no such job to be found.
    """
    if (processes is None) != (index is None) or (processes is not None and coordinator is None):
        raise UserError('--coordinator, --num_processes and --process_id go together: give all three, or none.')
    if processes is not None and index is not None and not 0 <= index < processes:
        raise UserError(f'--process_id={index} must lie between 0 and {processes - 1}.')
    if coordinator is not None and not coordinator.rpartition(':')[2].isdecimal():
        raise UserError(f'--coordinator={coordinator} must be HOST:PORT, such as 10.0.0.2:8476.')
    try:
        jax.distributed.initialize(coordinator, processes, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:  # a host that comes too late raises another kind, and is not the user's mistake
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.')
        raise UserError(
            f'--distributed found no job to join ({reason}); outside of TPU pods, SLURM and Kubernetes give '
            '--coordinator=HOST:PORT --num_processes=N --process_id=I.'
        ) from error


def raise_everywhere(function: Callable[[], T]) -> T:
    """Runs something that may go wrong in one process alone; all of them raise when it does in any.

    Raises:
        UserError: Of the first process that raised one, in every process.
    """
    if jax.process_count() == 1:
        return function()
    said = b''
    try:
        result = function()
    except UserError as error:
        said = str(error).encode()[:MESSAGE_BYTES] or b'?'
    padded = np.frombuffer(said.ljust(MESSAGE_BYTES, b'\0'), np.uint8)
    for row in np.asarray(multihost_utils.process_allgather(padded)):
        if text := bytes(row).rstrip(b'\0').decode(errors='ignore'):
            raise UserError(text, shared=True)
    return result


def process_zero_first(function: Callable[[], T]) -> T:
    """Runs something in process 0, and when that is done in the others, which find what it has left."""
    first = jax.process_index() == 0
    result = raise_everywhere(lambda: function() if first else None)
    return raise_everywhere(lambda: result if first and result is not None else function())


def all_processes(agrees: bool) -> bool:
    """Whether every process says so."""
    if jax.process_count() == 1:
        return agrees
    return bool(np.all(multihost_utils.process_allgather(np.asarray(agrees))))


def barrier(place: str) -> None:
    """Waits until every process is here; `place` is a name for where."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def should_print(error: UserError) -> bool:
    """Whether this process should tell the user: of an error that all have, process 0 alone."""
    return not error.shared or jax.process_index() == 0


def hard_exit(status: int) -> NoReturn:
    """Ends this process at once, without waiting for others that may wait for it; they end soon after."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
