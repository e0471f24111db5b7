"""Keeps a run alive on a slice: creates a lost slice again and continues the run from its checkpoint."""

import dataclasses
import time

from job import Job, new_attempt, program, run, setup
from pod import GcloudError, LaunchError, Machine, Pod, State, say

DONE = 0
FAILED = 1  # from the program, or from gcloud when the slice is gone
USER_ERROR = 2
LOST_CONNECTION = 255  # from ssh
MAX_FAILED_CHECKS = 10  # checks of the state that may fail in a row, for example while this machine has no network


class LostSliceError(Exception):
    """A slice was lost before it could be used."""


def babysit(pod: Pod, machine: Machine, job: Job, max_restarts: int, poll: float) -> int:
    """Runs a job to its end on a slice that may be taken away at any time.

    Args:
        pod: Slice to run on; created if it does not exist.
        machine: Kind of slice to create.
        job: Program to run, and the data that it needs.
        max_restarts: Maximum number of restarts. Finding the program again after a lost connection counts as one.
        poll: Seconds between two checks of the state of the slice.

    Returns:
        Exit status of the program: 0, or a status that a restart would not change.

    Raises:
        LaunchError: If all restarts are used up, or gcloud refuses the first command.
    """
    program(job)  # reports mistakes in the arguments before anything costs money
    if pod.shell.dry_run:
        return _dry_run(pod, machine, job)
    pod.check_state()  # reports mistakes in the zone, the project or the login, also before anything costs money
    attempt, running, status = '', False, USER_ERROR
    for restart in range(max_restarts + 1):
        if restart:
            time.sleep(poll)
            say(f'restart {restart} of {max_restarts}.')
        try:
            machine, created = _make_ready(pod, machine, poll)
            # After a lost connection the program still runs: only connect to it again.
            if created or not running:
                attempt, running = new_attempt(restart), False
                status = setup(pod, job)
            if running or status == DONE:
                status = run(pod, job, attempt)
                running = status == LOST_CONNECTION
            if status in (DONE, USER_ERROR):
                return status
            if status == FAILED:
                time.sleep(poll)  # the state of a slice that was taken away changes with a delay
                if _check_state(pod, poll).ready:
                    return status
            say(_restart_reason(status))
        except LostSliceError:
            say(f'{pod.name} was lost before it could be used.')
        except GcloudError as error:
            if restart == 0:
                raise
            say(str(error))
    raise LaunchError(
        f'{pod.name} used up all of its {max_restarts} restarts, and may still cost money. The checkpoints are '
        'kept: see the reason above, then start the same command again.',
        status or USER_ERROR,
    )


def _make_ready(pod: Pod, machine: Machine, poll: float) -> tuple[Machine, bool]:
    """Waits until the hosts can be used, and creates the slice if needed.

    Returns:
        The machine (queued if the existing slice is queued), and whether this call created the slice.

    Raises:
        LostSliceError: If the slice was created by this call and is lost already.
    """
    created, previous = False, None
    while not (state := _check_state(pod, poll)).ready:
        if state.request is not None:
            machine = dataclasses.replace(machine, queued=True)
        if state.node in ('STOPPED', 'STOPPING', 'HIDDEN'):
            raise LaunchError(f'{pod.name} is {state.node}, and babysit does not change that: start or delete it.')
        if state.lost or state.absent:
            if created:
                raise LostSliceError
            if state.lost:
                say(f'{pod.name} is lost ({state}): deleting it, and creating it again.')
                pod.delete(state)
            created = _create(pod, machine, poll)
            continue
        if state != previous:
            say(f'{pod.name}: {state}; checking again every {poll:g} s.')
            previous = state
        time.sleep(poll)
    return machine, created


def _create(pod: Pod, machine: Machine, poll: float) -> bool:
    """Tries to create a slice; returns False if the zone has no capacity."""
    say(f'creating {pod.name} ({machine.accelerator}{", spot" if machine.spot else ""}), which costs money.')
    try:
        pod.create(machine)
    except GcloudError as error:
        if not error.no_capacity:
            raise
        say(f'{error} Trying again in {poll:g} s.')
        time.sleep(poll)
        return False
    return True


def _check_state(pod: Pod, poll: float) -> State:
    for _ in range(MAX_FAILED_CHECKS - 1):
        try:
            return pod.check_state()
        except GcloudError as error:
            say(f'{error} Checking again in {poll:g} s.')
            time.sleep(poll)
    return pod.check_state()


def _restart_reason(status: int) -> str:
    match status:
        case 255:
            return 'the connection to the hosts was lost.'
        case 75:
            return 'the run received a signal to stop, saved a checkpoint, and must be started again.'
        case _:
            return f'the run ended with exit status {status}, which is not an error of the program itself.'


def _dry_run(pod: Pod, machine: Machine, job: Job) -> int:
    """Prints the commands of one round: delete a lost slice, create it, set it up and run."""
    pod.delete(pod.check_state())
    pod.create(machine)
    setup(pod, job)
    return run(pod, job, new_attempt())
