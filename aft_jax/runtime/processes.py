"""The processes of one distributed job: joining them, synchronising them, and raising an error in all of them."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from aft_jax.errors import UserError

T = TypeVar('T')
# Seconds after which a dead process is noticed and the others end.
HEARTBEAT_SECONDS = 30
MESSAGE_BYTES = 2000


def join(coordinator: str | None, processes: int | None, index: int | None) -> None:
    """Joins the processes of a job, before any device is used.

    Args:
        coordinator: HOST:PORT of process 0; None where JAX finds the job by itself (TPU pods, SLURM, Kubernetes).
        processes: Number of processes, or None.
        index: Index of this process, from 0, or None.

    Raises:
        UserError: If the arguments do not fit together, or no job is found.
    """
    if (processes is None) != (index is None) or (processes is not None and coordinator is None):
        raise UserError('--coordinator, --num_processes and --process_id go together: give all three, or none.')
    if processes is not None and index is not None and not 0 <= index < processes:
        raise UserError(f'--process_id={index} must lie between 0 and {processes - 1}.')
    if coordinator is not None and not coordinator.rpartition(':')[2].isdecimal():
        raise UserError(f'--coordinator={coordinator} must be HOST:PORT, such as 10.0.0.2:8476.')
    try:
        jax.distributed.initialize(coordinator, processes, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:  # a process that joins too late raises another error, which is not the user's mistake
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.')
        raise UserError(
            f'--distributed found no job to join ({reason}); outside of TPU pods, SLURM and Kubernetes give '
            '--coordinator=HOST:PORT --num_processes=N --process_id=I.'
        ) from error


def raise_everywhere(function: Callable[[], T]) -> T:
    """Runs a function in every process, and raises a UserError in all of them if it raises one in any.

    Raises:
        UserError: The error of the first process that raised one.
    """
    if jax.process_count() == 1:
        return function()
    message = b''
    try:
        result = function()
    except UserError as error:
        message = str(error).encode()[:MESSAGE_BYTES] or b'?'
    padded = np.frombuffer(message.ljust(MESSAGE_BYTES, b'\0'), np.uint8)
    for row in np.asarray(multihost_utils.process_allgather(padded)):
        if text := bytes(row).rstrip(b'\0').decode(errors='ignore'):
            raise UserError(text, shared=True)
    return result


def process_zero_first(function: Callable[[], T]) -> T:
    """Runs `function` in process 0 first and then in all other processes, which can reuse the files it wrote."""
    first = jax.process_index() == 0
    result = raise_everywhere(lambda: function() if first else None)
    return raise_everywhere(lambda: result if first and result is not None else function())


def all_processes(agrees: bool) -> bool:
    """Returns whether `agrees` is true in every process."""
    if jax.process_count() == 1:
        return agrees
    return bool(np.all(multihost_utils.process_allgather(np.asarray(agrees))))


def barrier(place: str) -> None:
    """Waits until every process has called it; `place` is the name of the barrier."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def should_print(error: UserError) -> bool:
    """Returns whether this process should print the error. Only process 0 prints an error that all processes have."""
    return not error.shared or jax.process_index() == 0


def hard_exit(status: int) -> NoReturn:
    """Ends this process at once, without waiting for the other processes, which end soon after."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
