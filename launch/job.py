"""The work on the hosts of a slice: copying the code, installing it, and starting the program."""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path

from pod import LaunchError, Pod, say

ROOT = Path(__file__).resolve().parent.parent
# The parts of the repository that the hosts need; results, environments and the history stay here.
CODE = ('aft_jax', 'configs', 'launch', 'pyproject.toml', 'constraints.txt', 'README.md', 'LICENSE')
# Directory where on_worker.sh mounts the share of --mount.
SHARED = '/mnt/aft_jax'
NOT_FOUND = 127  # exit status of a shell that does not find a command


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of the program, with its share and its data.

    Attributes:
        arguments: Arguments of aft_jax.main, with --config and --workdir.
        mount: SERVER:/SHARE (NFS) or gs://BUCKET, to be mounted at `SHARED` on every host; '' mounts nothing.
        dataset: Data set to prepare; '' prepares none.
        data_dir: Directory that all hosts share, for prepared data; '' keeps them on each host.
    """

    arguments: tuple[str, ...] = ()
    mount: str = ''
    dataset: str = ''
    data_dir: str = ''


def new_attempt(number: int = 0) -> str:
    """Builds a name for a start of the program, different for each number."""
    return f'{datetime.now(UTC):%Y%m%dT%H%M%S}-{number}'


def setup(pod: Pod, job: Job) -> int:
    """Copies the code to all hosts, installs it, and prepares the data; returns the first exit status that is not 0."""
    archive = ROOT / 'build' / f'aft_jax-{pod.name}' / 'aft_jax.tar.gz'
    steps = [
        lambda: pod.shell.stream(['mkdir', '-p', str(archive.parent)]),
        lambda: pod.shell.stream(
            ['tar', '-czf', str(archive), '--exclude=__pycache__', f'--directory={ROOT}', *CODE],
        ),
        lambda: pod.copy(str(archive), str(ROOT / 'launch' / 'on_worker.sh')),
        lambda: pod.ssh(['bash', 'on_worker.sh', 'setup', *([job.mount] if job.mount else [])]),
    ]
    if job.dataset:
        # In a shared directory one host prepares the data for all.
        directory, worker = ([job.data_dir], '0') if job.data_dir else ([], 'all')
        if not job.data_dir:
            say(f'without --data-dir every host prepares its own copy of {job.dataset}.')
        steps.append(lambda: pod.ssh(['bash', 'on_worker.sh', 'prepare', job.dataset, *directory], worker))
    status = next((status for step in steps if (status := step())), 0)
    if status:
        say(f'setting up {pod.name} ended with exit status {status}; see the reason above.')
    return status


def run(pod: Pod, job: Job, attempt: str) -> int:
    """Runs aft_jax.main on all hosts until it ends; returns its exit status.

    Args:
        pod: Slice that is set up.
        job: Program to run.
        attempt: Name of this start. If the hosts know the name, they follow that start instead of starting again.
    """
    status = pod.ssh(['bash', 'on_worker.sh', 'run', attempt, *program(job)])
    if status == NOT_FOUND:
        say(f'the hosts of {pod.name} are not set up; python launch/tpu.py setup does that.')
    return status


def program(job: Job) -> list[str]:
    """Checks and returns the arguments of aft_jax.main.

    Raises:
        LaunchError: If the arguments cannot work on the hosts.
    """
    arguments = list(job.arguments)
    config, workdir = _value(arguments, '--config'), _value(arguments, '--workdir')
    if not config or not workdir:
        raise LaunchError("give the program's own arguments after --, with at least -- --config=... --workdir=...")
    path = Path(config.partition(':')[0])
    if path.is_absolute() or not (ROOT / path).is_file():
        raise LaunchError(f'--config={config} must be a file of this repository, such as configs/cifar10.py.')
    if not workdir.startswith('/'):
        raise LaunchError(
            f'--workdir={workdir} must be an absolute path, of a directory that all hosts share. The program '
            f'writes ordinary files: mount a bucket or an NFS share (--mount), and name a directory under {SHARED}.'
        )
    if job.data_dir and not _value(arguments, '--config.data.dir'):
        arguments.append(f'--config.data.dir={job.data_dir}')
    return arguments


def _value(arguments: list[str], flag: str) -> str:
    return next((word.partition('=')[2] for word in reversed(arguments) if word.startswith(f'{flag}=')), '')
