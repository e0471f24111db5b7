"""Keeps a slice and its run alive: what was taken away is created again, and the run goes on from its checkpoint."""

import dataclasses
import time

from job import Job, new_attempt, program, run, setup
from pod import GcloudError, LaunchError, Machine, Pod, State, say

DONE = 0
FAILED = 1  # of the program, but of gcloud as well when the slice is gone
USER_ERROR = 2
LOST_CONNECTION = 255  # of ssh
PATIENCE = 10  # looks that may fail in a row, as they do while this machine has no network


class LostAgain(Exception):
    """A slice went before it could be used."""


def babysit(pod: Pod, machine: Machine, job: Job, max_restarts: int, poll: float) -> int:
    """Runs a job to its end on a slice that may be taken away at any time.

    Args:
        pod: The slice; created if it is not there.
        machine: What to create.
        job: What to run.
        max_restarts: How often the program may be started again, or found again after a lost connection.
        poll: Seconds between two looks at the state of the slice.

    Returns:
        The program's exit status: 0, or one that a restart would not change.

    Raises:
        LaunchError: All restarts are used up, or gcloud refuses from the start.
    """
    program(job)  # a mistake in the arguments should show before anything costs money
    if pod.shell.dry_run:
        return _rehearse(pod, machine, job)
    pod.look()  # so should one in the zone, the project or the login
    attempt, running, status = '', False, USER_ERROR
    for restart in range(max_restarts + 1):
        if restart:
            time.sleep(poll)
            say(f'restart {restart} of {max_restarts}.')
        try:
            machine, created = _make_ready(pod, machine, poll)
            # After a lost connection the program runs on; it is only to be found again.
            if created or not running:
                attempt, running = new_attempt(restart), False
                status = setup(pod, job)
            if running or status == DONE:
                status = run(pod, job, attempt)
                running = status == LOST_CONNECTION
            if status in (DONE, USER_ERROR):
                return status
            if status == FAILED:
                time.sleep(poll)  # the state of a slice that was taken away changes a little later
                if _look(pod, poll).ready:
                    return status
            say(_why(status))
        except LostAgain:
            say(f'{pod.name} was lost before it could be used.')
        except GcloudError as error:
            if restart == 0:
                raise
            say(str(error))
    raise LaunchError(
        f'{pod.name} used up all of its {max_restarts} restarts, and may still cost money; nothing that was saved is '
        'lost: see above for the reason, then start the same command again.',
        status or USER_ERROR,
    )


def _make_ready(pod: Pod, machine: Machine, poll: float) -> tuple[Machine, bool]:
    """Waits until the hosts can be used, and creates them where needed.

    Returns:
        The machine, queued if it was found so, and whether it was created here.

    Raises:
        LostAgain: What was created here is lost already.
    """
    created, seen = False, None
    while not (state := _look(pod, poll)).ready:
        if state.request is not None:
            machine = dataclasses.replace(machine, queued=True)
        if state.node in ('STOPPED', 'STOPPING', 'HIDDEN'):
            raise LaunchError(f'{pod.name} is {state.node}, which is not for a babysitter to undo: start or delete it.')
        if state.lost or state.absent:
            if created:
                raise LostAgain
            if state.lost:
                say(f'{pod.name} is lost ({state}): deleting it, and creating it again.')
                pod.delete(state)
            created = _create(pod, machine, poll)
            continue
        if state != seen:
            say(f'{pod.name}: {state}; looking again every {poll:g} s.')
            seen = state
        time.sleep(poll)
    return machine, created


def _create(pod: Pod, machine: Machine, poll: float) -> bool:
    """Tries to create a slice; returns whether the zone had one to give."""
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


def _look(pod: Pod, poll: float) -> State:
    for _ in range(PATIENCE - 1):
        try:
            return pod.look()
        except GcloudError as error:
            say(f'{error} Looking again in {poll:g} s.')
            time.sleep(poll)
    return pod.look()


def _why(status: int) -> str:
    match status:
        case 255:
            return 'the connection to the hosts was lost.'
        case 75:
            return 'the run was told to stop, saved what it had, and asks to be started again.'
        case _:
            return f'the run ended with exit status {status}, which is not its own doing.'


def _rehearse(pod: Pod, machine: Machine, job: Job) -> int:
    """Prints one round: a slice that was lost, created again, set up, and run on."""
    pod.delete(pod.look())
    pod.create(machine)
    setup(pod, job)
    return run(pod, job, new_attempt())
