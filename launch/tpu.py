"""Runs an experiment on a Cloud TPU slice, from creating it to deleting it; launch/README.md explains every step.

    python launch/tpu.py create  NAME --zone=Z --accelerator=v5litepod-16 [--spot]     creates a slice now, or fails
    python launch/tpu.py queue   NAME --zone=Z --accelerator=v5litepod-16 [--spot]     waits in the queue for a slice
    python launch/tpu.py status  NAME --zone=Z
    python launch/tpu.py setup   NAME --zone=Z --mount=SERVER:/SHARE [--dataset=cifar10 --data-dir=/mnt/aft_jax/tfds]
    python launch/tpu.py run     NAME --zone=Z -- --config=configs/cifar10.py --workdir=/mnt/aft_jax/runs/cifar10
    python launch/tpu.py stop    NAME --zone=Z                                         saves and ends what is running
    python launch/tpu.py babysit NAME, with the flags of queue, setup and run          all of that, until it is done
    python launch/tpu.py delete  NAME --zone=Z                                         ends the costs

--dry-run prints the commands and runs none. Exit status: that of the program (0 done, 75 start again), 2 a mistake that
you can correct, 130 interrupted (the program on the hosts continues).
"""

import argparse
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from babysit import babysit
from job import SHARED, Job, new_attempt, program, run, setup
from pod import LaunchError, Machine, Pod, Shell, say

INTERRUPTED = 130
RUNTIME_VERSIONS = {
    'v2': 'tpu-ubuntu2204-base',
    'v3': 'tpu-ubuntu2204-base',
    'v4': 'tpu-ubuntu2204-base',
    'v5litepod': 'v2-alpha-tpuv5-lite',
    'v5p': 'v2-alpha-tpuv5',
    'v6e': 'v2-alpha-tpuv6e',
}


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit status."""
    try:
        return _dispatch(arguments)
    except LaunchError as error:
        say(str(error))
        return error.status
    except KeyboardInterrupt:
        say('interrupted; the program on the hosts continues, and the slice still costs money.')
        return INTERRUPTED


def _dispatch(arguments: list[str]) -> int:
    before, dashes, after = _split(arguments)
    options = _parser().parse_args(before)
    if dashes and options.command not in ('run', 'babysit'):
        raise LaunchError(f'{options.command} takes nothing after --.')
    _check_place(options)
    pod = Pod(Shell(options.dry_run), options.name, options.zone, options.project)
    match options.command:
        case 'create' | 'queue':
            return _create(pod, _machine(options, options.command == 'queue'))
        case 'status':
            return _status(pod)
        case 'setup':
            if options.data_dir and not options.dataset:
                raise LaunchError(
                    '--data-dir is the directory for a prepared data set; name the data set with --dataset.'
                )
            return setup(pod, _job(options, after))
        case 'run':
            return _run(pod, _job(options, after), options.attempt)
        case 'stop':
            return pod.ssh(['bash', 'on_worker.sh', 'stop'])
        case 'babysit':
            status = babysit(
                pod, _machine(options, options.queued), _job(options, after), options.max_restarts, options.poll
            )
            _remind(pod, 'still costs money')
            return status
        case _:
            return _delete(pod)


def _create(pod: Pod, machine: Machine) -> int:
    pod.create(machine)
    _remind(pod, 'is in the queue, and costs money once ACTIVE' if machine.queued else 'is created, and costs money')
    return 0


def _status(pod: Pod) -> int:
    state = pod.check_state()
    if not pod.shell.dry_run:
        print(f'queued resource {pod.name}: {state.request or "not found"}')
        print(f'TPU VM {pod.name}: {state.node or "not found"}')
    return 0


def _run(pod: Pod, job: Job, attempt: str) -> int:
    program(job)
    attempt = attempt or new_attempt()
    say(f'the name of this start is {attempt}; after a lost connection use the same command with --attempt={attempt}.')
    return run(pod, job, attempt)


def _delete(pod: Pod) -> int:
    state = pod.check_state()
    if state.absent:
        say(f'there is neither a queued resource nor a TPU VM {pod.name} in {pod.zone}; nothing was deleted.')
        return 0
    what = [f'the queued resource {pod.name}'] * bool(state.request) + [f'the TPU VM {pod.name}'] * bool(state.node)
    say(f'deleting {" and ".join(what)}, with the disks of all hosts; buckets and NFS shares stay, and cost money.')
    pod.delete(state)
    return 0


def _remind(pod: Pod, what: str) -> None:
    if not pod.shell.dry_run:
        project = f' --project={pod.project}' if pod.project else ''
        say(f'{pod.name} {what}; this deletes it: python launch/tpu.py delete {pod.name} --zone={pod.zone}{project}')


def _split(arguments: list[str]) -> tuple[list[str], bool, list[str]]:
    if '--' not in arguments:
        return arguments, False, []
    place = arguments.index('--')
    return arguments[:place], True, arguments[place + 1 :]


def _check_place(options: argparse.Namespace) -> None:
    if not re.fullmatch('[a-z]([a-z0-9-]{0,60}[a-z0-9])?', options.name):
        raise LaunchError(
            f'{options.name!r} is not a valid name for a slice: use lower-case letters, digits and hyphens.'
        )
    if not re.fullmatch(r'[a-z]+-[a-z]+\d+-[a-z]', options.zone):
        raise LaunchError(f'--zone={options.zone} is not a zone such as us-west4-a.')


def _machine(options: argparse.Namespace, queued: bool) -> Machine:
    generation = re.fullmatch(r'([a-z0-9]+)-\d+', options.accelerator)
    version = options.runtime_version or RUNTIME_VERSIONS.get(generation[1] if generation else '')
    if not generation or not version:
        near = ' v5e slices are called v5litepod.' if options.accelerator.startswith('v5e') else ''
        raise LaunchError(
            f'--accelerator={options.accelerator} is not a type such as v5litepod-16; generations other than '
            f'{", ".join(RUNTIME_VERSIONS)} need --runtime-version as well.{near}'
        )
    return Machine(options.accelerator, version, options.spot, queued, tuple(options.gcloud_flag))


def _job(options: argparse.Namespace, arguments: list[str]) -> Job:
    mount = options.mount
    if mount and not re.fullmatch(r'gs://[^/]+|[^/:]+:/\S+', mount):
        raise LaunchError(f'--mount={mount} is neither SERVER:/SHARE nor gs://BUCKET.')
    if options.data_dir and not options.data_dir.startswith('/'):
        raise LaunchError(
            f'--data-dir={options.data_dir} must be a directory that all hosts share, such as {SHARED}/tfds.'
        )
    return Job(tuple(arguments), mount, options.dataset, options.data_dir)


def _from_zero(kind: Callable[[str], float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        if not 0 <= (value := kind(text)) < 1e6:
            raise ValueError
        return value

    convert.__name__ = 'number'  # the name in messages of argparse
    return convert


class _Parser(argparse.ArgumentParser):
    """Reports mistakes in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise LaunchError(f'{message}; see python launch/tpu.py --help.')


def _parser() -> argparse.ArgumentParser:
    place = _Parser(add_help=False)
    place.add_argument('name', metavar='NAME', help='name of the slice')
    place.add_argument('--zone', required=True)
    place.add_argument('--project', help='Google Cloud project (default: that of gcloud)')
    place.add_argument('--dry-run', action='store_true', help='print the commands, run none')
    machine = _Parser(add_help=False)
    machine.add_argument('--accelerator', required=True, help='TPU type, such as v5litepod-16')
    machine.add_argument('--runtime-version', help='image of the hosts (default: that of the generation)')
    machine.add_argument('--spot', action='store_true', help='spot machine: cheaper, and can be taken away at any time')
    machine.add_argument(
        '--gcloud-flag',
        action='append',
        default=[],
        help='flag for the create command of gcloud: --gcloud-flag=--network=mine',
    )
    shared = _Parser(add_help=False)
    shared.add_argument('--data-dir', default='', help='shared directory where one host prepares the data for all')
    data = _Parser(add_help=False, parents=[shared])
    data.add_argument('--mount', default='', help=f'SERVER:/SHARE or gs://BUCKET, mounted at {SHARED} on all hosts')
    data.add_argument('--dataset', default='', help='data set to prepare, such as cifar10')

    parser = _Parser(prog='launch/tpu.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND', parser_class=_Parser)

    def add(name: str, about: str, *parents: _Parser) -> _Parser:
        return commands.add_parser(name, help=about, description=about, parents=[place, *parents], allow_abbrev=False)

    add('create', 'Create a slice now.', machine)
    add('queue', 'Request a slice in the queue.', machine)
    add('status', 'Print the state.')
    add('setup', 'Copy the code to all hosts, install it, prepare data.', data)
    one = add('run', 'Run aft_jax.main on all hosts; its arguments follow --.', shared)
    one.set_defaults(mount='', dataset='')
    one.add_argument('--attempt', default='', help='name of an earlier start to follow')
    add('stop', 'Make the program on the hosts save and end.')
    kept = add('babysit', 'Create, set up and run until it is done; its arguments follow --.', machine, data)
    kept.add_argument('--queued', action='store_true', help='create through the queue')
    kept.add_argument(
        '--poll', type=_from_zero(float), default=60.0, help='seconds between two checks of the state (60)'
    )
    kept.add_argument('--max-restarts', type=_from_zero(int), default=20, help='maximum number of restarts (20)')
    add('delete', 'Delete the slice and its queued resource.')
    return parser


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
