"""A Cloud TPU slice, controlled by gcloud: create it, check its state, run commands on its hosts, delete it."""

import dataclasses
import re
import shlex
import subprocess
import sys
import textwrap

# ssh notices a dead connection after 90 s. Without these flags it would wait for a lost host without limit.
SSH_FLAGS = ('--ssh-flag=-oServerAliveInterval=30', '--ssh-flag=-oServerAliveCountMax=3')


class LaunchError(Exception):
    """A mistake that the user can correct, in one sentence."""

    def __init__(self, sentence: str, status: int = 2):
        """Creates an error with the message `sentence`; the launcher ends with `status`."""
        super().__init__(sentence)
        self.status = status


class GcloudError(LaunchError):
    """A failure of gcloud; `text` is everything that it wrote to stderr."""

    def __init__(self, command: list[str], text: str):
        """Creates the error for `command`."""
        # The first five words, gcloud compute tpus GROUP VERB, say enough.
        hint = '; run gcloud auth login' if re.search('active account|credential|reauth', text, re.IGNORECASE) else ''
        super().__init__(f'{" ".join(command[:5])} failed: {_reason(text)}{hint}.')
        self.text = text

    @property
    def missing(self) -> bool:
        """Whether the requested resource does not exist."""
        return re.search('NOT_FOUND|was not found', self.text) is not None

    @property
    def no_capacity(self) -> bool:
        """Whether the zone has no capacity for such a machine at present."""
        return 'no more capacity' in self.text


@dataclasses.dataclass(frozen=True)
class Shell:
    """Runs commands, or prints them in a form that a shell can read back."""

    dry_run: bool = False

    def capture(self, command: list[str]) -> str:
        """Runs a gcloud command and returns its output; raises GcloudError if it fails."""
        if self.dry_run:
            self.stream(command)
            return ''
        process = _start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        output, errors = process.communicate()
        if process.returncode:
            raise GcloudError(command, errors)
        return output.strip()

    def stream(self, command: list[str]) -> int:
        """Runs a command whose output goes to the terminal; returns its exit status.

        gcloud ends with the status of the first host that failed. That host may have failed only because it lost the
        host with the real error. So more informative statuses have priority: a user's mistake (2), then a lost
        connection (255), then a request to start again (75).
        """
        if self.dry_run:
            print(shlex.join(command), flush=True)
            return 0
        hosts = set()
        with _start(command, stderr=subprocess.PIPE) as process:
            for line in process.stderr or ():
                print(line, end='', file=sys.stderr, flush=True)
                if match := re.search(r'execution on worker \d+ failed with exit status (\d+)', line):
                    hosts.add(int(match[1]))
        return next((status for status in (2, 255, 75) if status in hosts), process.returncode)


@dataclasses.dataclass(frozen=True)
class Machine:
    """The kind of slice to create.

    Attributes:
        accelerator: TPU type, such as 'v5litepod-16'.
        runtime_version: Image of the hosts.
        spot: Whether to use a spot machine, which is cheaper and can be taken away at any time.
        queued: Whether to request the slice as a queued resource.
        flags: Further flags for gcloud's create command, unchanged.
    """

    accelerator: str
    runtime_version: str
    spot: bool = False
    queued: bool = False
    flags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class State:
    """States of the queued resource and of the TPU VM of one name, from gcloud; None if it does not exist."""

    request: str | None
    node: str | None

    @property
    def ready(self) -> bool:
        """Whether commands can be run on the hosts."""
        return self.node == 'READY' and self.request in (None, 'ACTIVE')

    @property
    def lost(self) -> bool:
        """Whether the slice does not recover by itself, and must be deleted and created again."""
        return self.request in ('SUSPENDED', 'FAILED') or (
            self.node in ('PREEMPTED', 'TERMINATED', 'SUSPENDED', 'FAILED') and self.request != 'SUSPENDING'
        )

    @property
    def absent(self) -> bool:
        """Whether neither of the two exists."""
        return self.request is None and self.node is None

    def __str__(self) -> str:
        words = [self.node or 'without a TPU VM', *([f'queued resource {self.request}'] if self.request else [])]
        return 'not there' if self.absent else ', '.join(words)


@dataclasses.dataclass(frozen=True)
class Pod:
    """One slice with all of its hosts; its queued resource, if it has one, has the same name."""

    shell: Shell
    name: str
    zone: str
    project: str | None = None

    def create(self, machine: Machine) -> None:
        """Creates the slice, or requests it in the queue."""
        group, image = ('queued-resources', 'runtime-version') if machine.queued else ('tpu-vm', 'version')
        flags = [f'--accelerator-type={machine.accelerator}', f'--{image}={machine.runtime_version}']
        if machine.queued:
            flags.append(f'--node-id={self.name}')
        if machine.spot:
            flags.append('--spot')
        self.shell.capture(self._gcloud(group, 'create', self.name, *flags, *machine.flags))

    def check_state(self) -> State:
        """Asks gcloud for the state of the slice."""
        return State(self._describe('queued-resources', 'value(state.state)'), self._describe('tpu-vm', 'value(state)'))

    def delete(self, state: State) -> None:
        """Deletes the queued resource and the TPU VM that exist according to `state`."""
        if state.request is not None:
            # --force also deletes the TPU VM of the request.
            self.shell.capture(self._gcloud('queued-resources', 'delete', self.name, '--force', '--quiet'))
        if state.node is not None and (state.request is None or self.shell.dry_run):
            self.shell.capture(self._gcloud('tpu-vm', 'delete', self.name, '--quiet'))

    def copy(self, *files: str) -> int:
        """Copies files into the home directory of every host; returns gcloud's exit status."""
        return self.shell.stream(self._gcloud('tpu-vm', 'scp', *files, f'{self.name}:', '--worker=all', '--quiet'))

    def ssh(self, remote: list[str], worker: str = 'all') -> int:
        """Runs a command on one host or on all hosts, and waits; returns its exit status as in `Shell.stream`.

        gcloud tries up to ten times to reach a host, also after a broken connection. Then the status is 255. The status
        is 1 if gcloud itself refuses, for example because the slice was taken away.
        """
        flags = [f'--worker={worker}', '--quiet', *SSH_FLAGS, f'--command={shlex.join(remote)}']
        return self.shell.stream(self._gcloud('tpu-vm', 'ssh', self.name, *flags))

    def _describe(self, group: str, form: str) -> str | None:
        try:
            return self.shell.capture(self._gcloud(group, 'describe', self.name, f'--format={form}')) or 'UNKNOWN'
        except GcloudError as error:
            if error.missing:
                return None
            raise

    def _gcloud(self, group: str, verb: str, *rest: str) -> list[str]:
        where = [f'--zone={self.zone}', *([f'--project={self.project}'] if self.project else [])]
        return ['gcloud', 'compute', 'tpus', group, verb, *rest, *where]


def say(text: str) -> None:
    """Prints a message to the user on stderr."""
    print(f'launch: {text}', file=sys.stderr, flush=True)


def _start(command: list[str], stdout: int | None = None, stderr: int | None = None) -> subprocess.Popen[str]:
    try:
        # Without a terminal gcloud asks no questions, which would block an unattended run.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, text=True, errors='replace'
        )
    except FileNotFoundError:
        hint = 'install the Google Cloud CLI' if command[0] == 'gcloud' else 'install it'
        raise LaunchError(f'{command[0]} is not on the PATH; {hint}, or see the commands with --dry-run.') from None


def _reason(text: str) -> str:
    """Extracts the error message from the output of gcloud, without its usage text."""
    if message := re.search(r'"message": "((?:[^"\\]|\\.)*)"', text):  # a failed operation, as JSON
        reason = message[1].replace('\\"', '"')
    else:
        error = re.search(r'^ERROR: (?:\(\S+\) )?(.+?)(?:\n\s*\n|\Z)', text, re.MULTILINE | re.DOTALL)
        reason = error[1] if error else text.strip() or 'it printed no reason'
    reason = re.sub(r'\s*Please run:$', '', textwrap.shorten(reason, 200, placeholder=' ...'))
    return reason.removesuffix('.')
