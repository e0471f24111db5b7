"""A Cloud TPU slice as gcloud sees it: the commands that create it, look at it, reach its hosts and delete it."""

import dataclasses
import re
import shlex
import subprocess
import sys
import textwrap

# A connection over which nothing passes is noticed as dead after 90 s; else a host that vanished would be waited for.
SSH_FLAGS = ('--ssh-flag=-oServerAliveInterval=30', '--ssh-flag=-oServerAliveCountMax=3')


class LaunchError(Exception):
    """One sentence about something that the user can put right."""

    def __init__(self, sentence: str, status: int = 2):
        """An error that says `sentence` and ends the launcher with `status`."""
        super().__init__(sentence)
        self.status = status


class GcloudError(LaunchError):
    """gcloud did not do what it was asked; `text` is all that it said."""

    def __init__(self, command: list[str], text: str):
        """The failure of `command`."""
        # gcloud compute tpus GROUP VERB: the rest is the user's own.
        hint = '; run gcloud auth login' if re.search('active account|credential|reauth', text, re.IGNORECASE) else ''
        super().__init__(f'{" ".join(command[:5])} failed: {_reason(text)}{hint}.')
        self.text = text

    @property
    def missing(self) -> bool:
        """Whether what was asked for does not exist."""
        return re.search('NOT_FOUND|was not found', self.text) is not None

    @property
    def no_capacity(self) -> bool:
        """Whether the zone has no such machine to give at this moment."""
        return 'no more capacity' in self.text


@dataclasses.dataclass(frozen=True)
class Shell:
    """Runs commands, or prints them in a form that a shell can read back."""

    dry_run: bool = False

    def ask(self, command: list[str]) -> str:
        """Returns what a command of gcloud's prints; raises GcloudError if it fails."""
        if self.dry_run:
            self.show(command)
            return ''
        process = _start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        output, said = process.communicate()
        if process.returncode:
            raise GcloudError(command, said)
        return output.strip()

    def show(self, command: list[str]) -> int:
        """Runs a command whose output is the user's to see; returns its exit status.

        gcloud ends with the status of the first host that failed, which may only have lost the one that is the reason.
        So a status that says what to do wins: a user's mistake, then a lost connection, then a wish to start again.
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
    """What is created.

    Attributes:
        accelerator: TPU type, such as 'v5litepod-16'.
        runtime_version: Image of the hosts.
        spot: Whether it is cheaper and can be taken away at any time.
        queued: Whether it is asked for as a queued resource.
        flags: Flags of gcloud's create command, as they are.
    """

    accelerator: str
    runtime_version: str
    spot: bool = False
    queued: bool = False
    flags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class State:
    """What gcloud says of the queued resource and of the TPU VM of one name; None: there is none."""

    request: str | None
    node: str | None

    @property
    def ready(self) -> bool:
        """Whether commands can be run on the hosts."""
        return self.node == 'READY' and self.request in (None, 'ACTIVE')

    @property
    def lost(self) -> bool:
        """Whether it will not come back by itself, and has to be deleted and created again."""
        return self.request in ('SUSPENDED', 'FAILED') or (
            self.node in ('PREEMPTED', 'TERMINATED', 'SUSPENDED', 'FAILED') and self.request != 'SUSPENDING'
        )

    @property
    def absent(self) -> bool:
        """Whether there is nothing."""
        return self.request is None and self.node is None

    def __str__(self) -> str:
        words = [self.node or 'without a TPU VM', *([f'queued resource {self.request}'] if self.request else [])]
        return 'not there' if self.absent else ', '.join(words)


@dataclasses.dataclass(frozen=True)
class Pod:
    """One slice, all of its hosts; its queued resource, if it has one, bears the same name."""

    shell: Shell
    name: str
    zone: str
    project: str | None = None

    def create(self, machine: Machine) -> None:
        """Creates the slice, or asks for it in the queue."""
        group, image = ('queued-resources', 'runtime-version') if machine.queued else ('tpu-vm', 'version')
        flags = [f'--accelerator-type={machine.accelerator}', f'--{image}={machine.runtime_version}']
        if machine.queued:
            flags.append(f'--node-id={self.name}')
        if machine.spot:
            flags.append('--spot')
        self.shell.ask(self._gcloud(group, 'create', self.name, *flags, *machine.flags))

    def look(self) -> State:
        """Returns the state of the slice."""
        return State(self._describe('queued-resources', 'value(state.state)'), self._describe('tpu-vm', 'value(state)'))

    def delete(self, state: State) -> None:
        """Deletes what `state` says is there."""
        if state.request is not None:
            # Only with --force does the request take its TPU VM with it.
            self.shell.ask(self._gcloud('queued-resources', 'delete', self.name, '--force', '--quiet'))
        if state.node is not None and (state.request is None or self.shell.dry_run):
            self.shell.ask(self._gcloud('tpu-vm', 'delete', self.name, '--quiet'))

    def copy(self, *files: str) -> int:
        """Copies files into the home directory of every host; returns gcloud's exit status."""
        return self.shell.show(self._gcloud('tpu-vm', 'scp', *files, f'{self.name}:', '--worker=all', '--quiet'))

    def ssh(self, remote: list[str], worker: str = 'all') -> int:
        """Runs a command on one host or on all, and waits; returns its exit status as `Shell.show` does.

        gcloud dials up to ten times a host that it cannot reach, or whose connection breaks; then the status is 255.
        It is 1 when gcloud itself refuses, as when the slice was taken away.
        """
        flags = [f'--worker={worker}', '--quiet', *SSH_FLAGS, f'--command={shlex.join(remote)}']
        return self.shell.show(self._gcloud('tpu-vm', 'ssh', self.name, *flags))

    def _describe(self, group: str, form: str) -> str | None:
        try:
            return self.shell.ask(self._gcloud(group, 'describe', self.name, f'--format={form}')) or 'UNKNOWN'
        except GcloudError as error:
            if error.missing:
                return None
            raise

    def _gcloud(self, group: str, verb: str, *rest: str) -> list[str]:
        where = [f'--zone={self.zone}', *([f'--project={self.project}'] if self.project else [])]
        return ['gcloud', 'compute', 'tpus', group, verb, *rest, *where]


def say(text: str) -> None:
    """Tells the user something that is not the result of the command."""
    print(f'launch: {text}', file=sys.stderr, flush=True)


def _start(command: list[str], stdout: int | None = None, stderr: int | None = None) -> subprocess.Popen[str]:
    try:
        # Without a terminal gcloud asks no questions, which nobody would answer at night.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, text=True, errors='replace'
        )
    except FileNotFoundError:
        hint = 'install the Google Cloud CLI' if command[0] == 'gcloud' else 'install it'
        raise LaunchError(f'{command[0]} is not on the PATH; {hint}, or see the commands with --dry-run.') from None


def _reason(text: str) -> str:
    """Returns what gcloud says is wrong, without how to use it."""
    if message := re.search(r'"message": "((?:[^"\\]|\\.)*)"', text):  # of a failed operation, as JSON
        said = message[1].replace('\\"', '"')
    else:
        error = re.search(r'^ERROR: (?:\(\S+\) )?(.+?)(?:\n\s*\n|\Z)', text, re.MULTILINE | re.DOTALL)
        said = error[1] if error else text.strip() or 'it said nothing'
    said = re.sub(r'\s*Please run:$', '', textwrap.shorten(said, 200, placeholder=' ...'))
    return said.removesuffix('.')
