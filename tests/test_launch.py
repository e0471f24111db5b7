"""Tests of the launchers with a fake gcloud (tests/launch_gcloud.py), a fake SLURM and a fake Python."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / 'launch'
SCRIPTS = sorted(LAUNCH.glob('*.sh'))
# The launcher and the fake need the standard library only, and start faster without site-packages.
PYTHON = [sys.executable, '-S', '-E']
PLACE = ['pod', '--zone=us-west4-a']
MACHINE = ['--accelerator=v5litepod-16', '--spot']
PROGRAM = ['--config=configs/cifar10.py', '--workdir=/mnt/aft_jax/runs/one']
BABYSIT = ['babysit', *PLACE, *MACHINE, '--poll=0']


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Cloud:
    """A fake Google Cloud with its slices, and the launcher that uses it."""

    def __init__(self, home: Path, monkeypatch, capfd):
        self.home, self.capfd = home, capfd
        fake = shlex.quote(str(Path(__file__).with_name('launch_gcloud.py')))
        executable(home / 'bin' / 'gcloud', f'#!/bin/sh\nexec {" ".join(map(shlex.quote, PYTHON))} {fake} "$@"\n')
        monkeypatch.setenv('PATH', f'{home}/bin:{os.environ["PATH"]}')
        monkeypatch.setenv('FAKE_GCLOUD', str(home))
        monkeypatch.syspath_prepend(LAUNCH)
        monkeypatch.setattr('job.CODE', ('LICENSE',))  # packing everything takes longer than all the rest
        self.set()

    def set(self, **world) -> None:
        (self.home / 'world.json').write_text(json.dumps(world))
        (self.home / 'calls.jsonl').write_text('')

    @property
    def world(self) -> dict:
        return json.loads((self.home / 'world.json').read_text())

    @property
    def calls(self) -> list[str]:
        """The gcloud commands in short form, without the checks of the state."""
        words = []
        for line in (self.home / 'calls.jsonl').read_text().splitlines():
            group, verb, *rest = json.loads(line)[2:]
            command = [word.partition('on_worker.sh ')[2] for word in rest if word.startswith('--command=')]
            if verb != 'describe':
                words.append(command[0].split()[0] if command else f'{group} {verb}' if verb != 'scp' else verb)
        return words

    def launch(self, *arguments: str) -> subprocess.CompletedProcess:
        """Calls launch/tpu.py in this process, which is faster than a process of its own."""
        import tpu

        self.capfd.readouterr()
        status = tpu.main(list(arguments))
        return subprocess.CompletedProcess(arguments, status, *self.capfd.readouterr())


@pytest.fixture
def cloud(tmp_path, monkeypatch, capfd):
    yield Cloud(tmp_path, monkeypatch, capfd)
    shutil.rmtree(ROOT / 'build' / 'aft_jax-pod', ignore_errors=True)


def end(process: subprocess.Popen) -> tuple[int, str]:
    """Waits for a process; returns its exit status and its output."""
    try:
        output, errors = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, output + (errors or '')


def assert_one_sentence(done: subprocess.CompletedProcess, expected: str, status: int = 2):
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith('launch: ') and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert expected in done.stderr


# ---- TPU slices, command by command


def test_create_status_and_delete(cloud):
    done = cloud.launch('create', *PLACE, *MACHINE, '--gcloud-flag=--network=mine')
    assert done.returncode == 0 and 'costs money' in done.stderr, done.stderr
    assert cloud.world == {'node': 'READY'}
    call = json.loads((cloud.home / 'calls.jsonl').read_text())
    assert {'--version=v2-alpha-tpuv5-lite', '--network=mine', '--spot'} <= set(call)
    assert cloud.launch('status', *PLACE).stdout == 'queued resource pod: not found\nTPU VM pod: READY\n'
    done = cloud.launch('delete', *PLACE)
    assert 'deleting the TPU VM pod, with the disks' in done.stderr and 'queued' not in done.stderr
    assert cloud.world == {}
    done = cloud.launch('delete', *PLACE)
    assert done.returncode == 0 and 'nothing was deleted' in done.stderr


def test_queue_status_and_delete(cloud):
    cloud.set(queue=['WAITING_FOR_RESOURCES', 'ACTIVE'])
    assert 'in the queue' in cloud.launch('queue', *PLACE, *MACHINE).stderr
    assert cloud.launch('status', *PLACE).stdout == (
        'queued resource pod: WAITING_FOR_RESOURCES\nTPU VM pod: not found\n'
    )
    assert 'pod: ACTIVE\nTPU VM pod: READY' in cloud.launch('status', *PLACE).stdout
    assert 'the queued resource pod and the TPU VM pod' in cloud.launch('delete', *PLACE).stderr
    assert 'request' not in cloud.world and 'node' not in cloud.world


def test_setup_prepares_data_once_in_a_shared_directory(cloud):
    cloud.set(node='READY')
    shared = cloud.launch(
        'setup', *PLACE, '--mount=10.0.0.2:/share', '--dataset=cifar10', '--data-dir=/mnt/aft_jax/tfds'
    )
    assert shared.returncode == 0, shared.stderr
    assert cloud.calls == ['scp', 'setup', 'prepare']
    log = (cloud.home / 'calls.jsonl').read_text()
    assert '"--worker=0"' in log and 'prepare cifar10 /mnt/aft_jax/tfds' in log and 'setup 10.0.0.2:/share' in log
    cloud.set(node='READY')
    alone = cloud.launch('setup', *PLACE, '--dataset=cifar10')
    assert 'every host prepares its own copy' in alone.stderr
    assert '"--worker=0"' not in (cloud.home / 'calls.jsonl').read_text()


def test_setup_packs_the_files_that_hosts_need(cloud):
    cloud.set(node='READY')
    # The script itself in a process of its own, with the real list of files.
    subprocess.run([*PYTHON, 'launch/tpu.py', 'setup', *PLACE], cwd=ROOT, check=True, timeout=60)
    assert cloud.calls == ['scp', 'setup']
    archive = ROOT / 'build' / 'aft_jax-pod' / 'aft_jax.tar.gz'
    names = subprocess.run(['tar', '-tzf', archive], capture_output=True, text=True, check=True).stdout.split()
    assert {'aft_jax/main.py', 'configs/cifar10.py', 'launch/prepare.py', 'pyproject.toml'} <= set(names)
    assert not [name for name in names if '__pycache__' in name or name.startswith(('.git', 'runs', 'tests'))]


def test_run_passes_arguments_and_status(cloud):
    cloud.set(node='READY', runs=[{'status': 75}, {'status': 127}])
    done = cloud.launch('run', *PLACE, '--data-dir=/d', '--attempt=mine', '--', *PROGRAM, "--config.stages=('a', 'b')")
    assert done.returncode == 75 and 'worker says: run' in done.stdout, done.stderr
    call = json.loads((cloud.home / 'calls.jsonl').read_text())
    remote = next(word for word in call if word.startswith('--command=')).removeprefix('--command=')
    assert shlex.split(remote) == [
        *('bash', 'on_worker.sh', 'run', 'mine'),
        *PROGRAM,
        "--config.stages=('a', 'b')",
        '--config.data.dir=/d',
    ]
    assert 'setup does that' in cloud.launch('run', *PLACE, '--', *PROGRAM).stderr


# ---- babysitting


def test_babysit_recreates_a_preempted_slice(cloud):
    cloud.set(runs=[{'status': 255, 'node': 'PREEMPTED'}, {'status': 0}])
    done = cloud.launch(*BABYSIT, '--', *PROGRAM)
    assert done.returncode == 0, done.stderr
    create = ['tpu-vm create', 'scp', 'setup', 'run']
    assert cloud.calls == [*create, 'tpu-vm delete', *create]
    assert 'pod is lost (PREEMPTED)' in done.stderr and 'tpu.py delete pod' in done.stderr


def test_babysit_recreates_a_queued_slice(cloud):
    cloud.set(
        queue=['WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE'],
        runs=[{'status': 75, 'request': 'SUSPENDED', 'node': 'PREEMPTED'}, {'status': 0}],
    )
    done = cloud.launch(*BABYSIT, '--queued', '--', *PROGRAM)
    assert done.returncode == 0, done.stderr
    create = ['queued-resources create', 'scp', 'setup', 'run']
    assert cloud.calls == [*create, 'queued-resources delete', *create]
    assert 'without a TPU VM, queued resource WAITING_FOR_RESOURCES; checking again' in done.stderr


def test_babysit_detects_a_queued_slice(cloud):
    cloud.set(request='SUSPENDED', node='PREEMPTED', runs=[{'status': 0}])
    assert cloud.launch(*BABYSIT, '--', *PROGRAM).returncode == 0
    assert cloud.calls[:2] == ['queued-resources delete', 'queued-resources create']


@pytest.mark.parametrize('status', [1, 2])
def test_babysit_returns_failures_of_the_program(cloud, status):
    cloud.set(node='READY', runs=[{'status': status}])
    done = cloud.launch(*BABYSIT, '--', *PROGRAM)
    assert done.returncode == status
    assert cloud.calls == ['scp', 'setup', 'run']


@pytest.mark.parametrize(
    'statuses, runs', [([134, 2], 1), ([134, 1, 75], 2), ([75, 255], 2), ([1, 134], 1), ([134, 134], 2)]
)
def test_babysit_uses_the_most_informative_host_status(cloud, statuses, runs):
    cloud.set(node='READY', runs=[{'statuses': statuses}, {'status': 0}])
    done = cloud.launch(*BABYSIT, '--', *PROGRAM)
    assert cloud.calls.count('run') == runs
    assert done.returncode == {1: 2 if 2 in statuses else 1, 2: 0}[runs]
    assert cloud.calls.count('setup') == (1 if 255 in statuses else runs)


def test_babysit_restarts_after_a_failure_by_preemption(cloud):
    cloud.set(node='READY', runs=[{'status': 1, 'node': 'PREEMPTED'}, {'status': 0}])
    assert cloud.launch(*BABYSIT, '--', *PROGRAM).returncode == 0
    assert cloud.calls.count('run') == 2


def test_babysit_stops_after_max_restarts(cloud):
    cloud.set(node='READY', runs=[{'status': 75}] * 5)
    done = cloud.launch(*BABYSIT, '--max-restarts=2', '--', *PROGRAM)
    assert done.returncode == 75 and 'used up all of its 2 restarts' in done.stderr
    assert cloud.calls.count('run') == 3


def test_babysit_reconnects_after_a_lost_connection(cloud):
    cloud.set(node='READY', runs=[{'status': 255}, {'status': 0}])
    assert cloud.launch(*BABYSIT, '--', *PROGRAM).returncode == 0
    assert cloud.calls == ['scp', 'setup', 'run', 'run']  # nothing is installed under a program that runs
    log = (cloud.home / 'calls.jsonl').read_text()
    starts = {word for word in log.split() if word.endswith('-0') and word.startswith('2')}
    assert len(starts) == 1


def test_babysit_names_each_start_differently(cloud):
    cloud.set(node='READY', runs=[{'status': 75}, {'status': 0}])
    assert cloud.launch(*BABYSIT, '--', *PROGRAM).returncode == 0
    calls = [json.loads(line) for line in (cloud.home / 'calls.jsonl').read_text().splitlines()]
    commands = [word.split()[3] for call in calls for word in call if ' run ' in word]
    assert len(set(commands)) == 2


def test_babysit_waits_for_capacity_but_not_for_quota(cloud):
    full = '{\n  "code": 8,\n  "message": "There is no more capacity in the zone \\"us-west4-a\\""\n}'
    cloud.set(create_errors=[full, full])
    done = cloud.launch(*BABYSIT, '--', *PROGRAM)
    assert done.returncode == 0
    assert 'no more capacity in the zone "us-west4-a". Trying again' in done.stderr
    cloud.set(create_errors=['Quota limit has been exceeded.'])
    assert 'Quota limit has been exceeded.' in (done := cloud.launch(*BABYSIT, '--', *PROGRAM)).stderr
    assert done.returncode == 2 and cloud.calls == ['tpu-vm create']


def test_babysit_gives_up_a_slice_that_never_becomes_ready(cloud):
    cloud.set(queue=['FAILED'])
    done = cloud.launch(*BABYSIT, '--queued', '--max-restarts=1', '--', *PROGRAM)
    assert done.returncode == 2 and 'lost before it could be used' in done.stderr
    assert cloud.calls.count('queued-resources create') == 2


def test_babysit_retries_network_failures_but_not_a_missing_login(cloud):
    cloud.set(node='READY', describe_works=4, describe_fails=3)
    assert cloud.launch(*BABYSIT, '--', *PROGRAM).returncode == 0
    cloud.set(node='READY', runs=[{'status': 75}], describe_works=4, describe_fails=3)
    done = cloud.launch(*BABYSIT, '--', *PROGRAM)
    assert done.returncode == 0 and 'no network' in done.stderr
    cloud.set(logged_out=True)
    assert cloud.launch(*BABYSIT, '--', *PROGRAM).returncode == 2
    assert len((cloud.home / 'calls.jsonl').read_text().splitlines()) == 1


def test_babysit_leaves_a_stopped_slice_alone(cloud):
    cloud.set(node='STOPPED')
    assert_one_sentence(cloud.launch(*BABYSIT, '--', *PROGRAM), 'pod is STOPPED')
    assert cloud.calls == []


# ---- mistakes

MISTAKES = {
    'create pod --accelerator=v6e-8': 'arguments are required: --zone',
    'create pod --zone=us-west4-a': 'arguments are required: --accelerator',
    'create pod --zone=us-west4 --accelerator=v6e-8': '--zone=us-west4 is not a zone such as',
    'create pod --zone=us-west4-a --accelerator=v5e-16': 'v5e slices are called v5litepod',
    'create pod --zone=us-west4-a --accelerator=v9-16': 'need --runtime-version',
    'create pod --zone=us-west4-a --accelerator=v6e': 'is not a type such as',
    'create Pod_1 --zone=us-west4-a --accelerator=v6e-8': "'Pod_1' is not a valid name",
    'create pod --zone=us-west4-a --accelerator=v6e-8 -- x': 'takes nothing after --',
    'fly pod --zone=us-west4-a': "invalid choice: 'fly'",
    'status pod --zone=us-west4-a --spot': 'unrecognized arguments: --spot',
    'setup pod --zone=us-west4-a --data-dir=/d': 'name the data set with --dataset',
    'setup pod --zone=us-west4-a --dataset=cifar10 --data-dir=d': 'a directory that all hosts share',
    'setup pod --zone=us-west4-a --mount=/mnt': 'neither SERVER:/SHARE nor gs://BUCKET',
    'run pod --zone=us-west4-a': 'at least -- --config=... --workdir=...',
    'run pod --zone=us-west4-a -- --config=configs/cifar10.py': 'at least -- --config=... --workdir=...',
    'run pod --zone=us-west4-a -- --config=configs/no.py --workdir=/w': 'must be a file of this repository',
    'run pod --zone=us-west4-a -- --config=configs/cifar10.py --workdir=gs://b/w': 'a directory that all hosts share',
    'babysit pod --zone=us-west4-a --accelerator=v6e-8 --poll=soon -- x': "invalid number value: 'soon'",
    'babysit pod --zone=us-west4-a --accelerator=v6e-8 --poll=-1 -- x': "invalid number value: '-1'",
    'babysit pod --zone=us-west4-a --accelerator=v6e-8 --max-restarts=-1 -- x': "invalid number value: '-1'",
    'run pod --zone=us-west4-a --mount=a:/b -- x': 'unrecognized arguments: --mount=a:/b',
    'babysit pod --zone=us-west4-a --accelerator=v6e-8 -- --workdir=/w': 'at least -- --config=... --workdir=...',
}


@pytest.mark.parametrize('line', MISTAKES)
def test_tpu_reports_mistakes_in_one_sentence(cloud, line):
    assert_one_sentence(cloud.launch(*line.split()), MISTAKES[line])
    assert cloud.calls == []


def test_tpu_reports_a_missing_login(cloud):
    cloud.set(logged_out=True)
    for command in (['create', *PLACE, *MACHINE], ['status', *PLACE], ['delete', *PLACE]):
        assert_one_sentence(cloud.launch(*command), 'active account selected; run gcloud auth login.')


def test_tpu_reports_a_missing_gcloud(cloud, monkeypatch):
    monkeypatch.setenv('PATH', str(cloud.home / 'nothing'))
    assert_one_sentence(cloud.launch('status', *PLACE), 'gcloud is not on the PATH; install the Google Cloud CLI')


# ---- dry runs

DRY = {
    'create': [*PLACE, *MACHINE],
    'queue': [*PLACE, *MACHINE],
    'status': PLACE,
    'setup': [*PLACE, '--dataset=cifar10', '--data-dir=/mnt/aft_jax/t f', '--mount=gs://bucket'],
    'run': [*PLACE, '--', *PROGRAM, "--config.stages=('infect',)"],
    'stop': PLACE,
    'babysit': [*PLACE, *MACHINE, '--queued', '--', *PROGRAM, '--config.dataset=folder:/mnt/a b$c'],
    'delete': PLACE,
}


@pytest.mark.parametrize('command', DRY)
def test_dry_run_prints_shell_commands_and_runs_nothing(cloud, command):
    done = cloud.launch(command, '--dry-run', *DRY[command])
    assert done.returncode == 0, done.stderr
    assert (cloud.home / 'calls.jsonl').read_text() == ''
    lines = done.stdout.splitlines()
    assert lines and {shlex.split(line)[0] for line in lines} <= {'gcloud', 'tar', 'mkdir'}
    assert subprocess.run(['bash', '-n'], input=done.stdout, text=True, check=False).returncode == 0
    # The fake gcloud accepts the printed lines when a shell runs them.
    cloud.set(request='ACTIVE', node='READY')
    if command in ('setup', 'run', 'status', 'stop'):
        ran = subprocess.run(['bash', '-e'], input=done.stdout, text=True, capture_output=True)
        assert ran.returncode == 0, ran.stderr


# ---- what runs on the hosts


# Waits without a child process: bash would print a message when a signal ends a child.
FOR_EVER = 'exec 9<> <(:); while :; do read -rt 0.05 -u 9; done'
SAVES_ON_SIGTERM = f'trap "echo saved; exit 75" TERM; echo "$@" >>~/starts; touch ~/up; {FOR_EVER}'


class Host:
    """One host of a slice, where the program is a shell script of the test."""

    def __init__(self, home: Path, program: str):
        self.home = home
        (home / '.aft_jax' / 'code').mkdir(parents=True)
        executable(home / '.aft_jax' / 'venv' / 'bin' / 'python', f'#!/usr/bin/env bash\n{program}\n')

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            ['bash', LAUNCH / 'on_worker.sh', *arguments],
            env=os.environ | {'HOME': str(self.home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 20
        while not (self.home / name).exists():
            assert time.monotonic() < deadline, f'{name} never came'
            time.sleep(0.02)


@pytest.fixture
def make_host(tmp_path):
    yield lambda program: Host(tmp_path, program)
    for path in tmp_path.glob('.aft_jax/starts/*/pid'):
        if not path.with_name('status').exists() and (pid := int(path.read_text())) != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def test_on_worker_run_returns_the_status_of_the_program(make_host):
    host = make_host('printf "%s\\n" "$@"; exit 3')
    status, output = end(host.start('run', 'one', '--config=c', "--config.stages=('a b',)"))
    assert status == 3
    assert output.splitlines() == ['-m', 'aft_jax.main', '--distributed', '--config=c', "--config.stages=('a b',)"]


def test_on_worker_run_finds_the_program_after_a_lost_connection(make_host, tmp_path):
    host = make_host('echo started; touch ~/up; while [ ! -e ~/go ]; do sleep 0.05; done; echo done; exit 7')
    lost = host.start('run', 'one')
    host.wait_for('up')
    os.killpg(lost.pid, signal.SIGKILL)
    end(lost)
    again = host.start('run', 'one')
    time.sleep(0.3)
    (tmp_path / 'go').touch()
    assert end(again) == (7, 'started\ndone\n')
    assert end(host.start('run', 'one')) == (7, 'started\ndone\n')


def test_on_worker_stop_and_new_run_let_the_program_save(make_host, tmp_path):
    host = make_host(SAVES_ON_SIGTERM)
    first = host.start('run', 'one')
    host.wait_for('up')
    (tmp_path / 'up').unlink()
    second = host.start('run', 'two')
    assert end(first) == (75, 'saved\n')
    host.wait_for('up')
    assert end(host.start('stop')) == (0, '')
    assert end(second) == (75, 'saved\n')
    assert len((tmp_path / 'starts').read_text().splitlines()) == 2


def test_on_worker_run_asks_for_a_restart_after_a_kill_or_reboot(make_host, tmp_path):
    host = make_host(SAVES_ON_SIGTERM)
    process = host.start('run', 'one')
    host.wait_for('up')
    start = tmp_path / '.aft_jax' / 'starts' / 'one'
    os.killpg(int((start / 'pid').read_text()), signal.SIGKILL)
    status, output = end(process)
    assert status == 75 and 'ended from outside' in output
    (start / 'pid').write_text(str(os.getpid()))  # another program got its number
    (start / 'boot').write_text('before')
    assert end(host.start('run', 'one'))[0] == 75


def test_on_worker_run_requires_setup(make_host, tmp_path):
    host = make_host('')
    shutil.rmtree(tmp_path / '.aft_jax' / 'code')
    assert end(host.start('run', 'one')) == (127, 'launch: this host is not set up.\n')


def test_on_worker_setup_installs_the_code(make_host, tmp_path):
    host = make_host('')
    log = tmp_path / 'log'
    executable(tmp_path / 'bin' / 'python3', f'#!/bin/sh\necho "$PWD: $@" >>{log}\n')
    subprocess.run(['tar', '-czf', tmp_path / 'aft_jax.tar.gz', '-C', ROOT, 'pyproject.toml'], check=True)
    environment = os.environ | {'HOME': str(tmp_path), 'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}'}
    subprocess.run(['bash', LAUNCH / 'on_worker.sh', 'setup'], env=environment, check=True, timeout=30)
    install = log.read_text().splitlines()[-1]
    assert install.startswith(f'{host.home}/.aft_jax/code: -m uv pip install')
    assert install.endswith('-c constraints.txt .[demo,report] jax[tpu]')
    assert (tmp_path / '.aft_jax' / 'code' / 'pyproject.toml').exists()


def test_prepare_reports_mistakes_in_one_sentence(capsys, monkeypatch):
    monkeypatch.syspath_prepend(LAUNCH)
    import prepare

    assert prepare.main(['cifar']) == 2
    assert capsys.readouterr().err.startswith("launch: There is no data set 'cifar'")
    assert prepare.main([]) == 2
    assert prepare.main(['mnist5k']) == 0
    assert 'images are ready' in capsys.readouterr().out


# ---- SLURM


def slurm(home: Path, status: int, *arguments: str, **environment: str) -> tuple[int, list[str], str]:
    """Runs launch/slurm.sh; returns its exit status, the commands that it called, and its stderr."""
    log = home / 'log'
    for name, ends in {'srun': status, 'scontrol': 0, 'python': 0}.items():
        executable(home / 'bin' / name, f'#!/bin/sh\necho "{name} [$JAX_LOCAL_DEVICE_IDS] $*" >>{log}\nexit {ends}\n')
    done = subprocess.run(
        ['bash', LAUNCH / 'slurm.sh', *arguments],
        env={'PATH': f'{home}/bin:{os.environ["PATH"]}', 'PYTHON': 'python', 'SLURM_JOB_ID': '17'} | environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.returncode, log.read_text().splitlines() if log.exists() else [], done.stderr


def test_slurm_runs_once_and_returns_success(tmp_path):
    status, calls, _ = slurm(tmp_path, 0, *PROGRAM, SLURM_GPUS_ON_NODE='4', SLURM_NTASKS_PER_NODE='1')
    assert status == 0
    assert calls == [f'srun [0,1,2,3] --kill-on-bad-exit=0 python -m aft_jax.main --distributed {" ".join(PROGRAM)}']


def test_slurm_gives_one_gpu_to_each_process(tmp_path):
    _, calls, _ = slurm(tmp_path, 0, SLURM_GPUS_ON_NODE='4', SLURM_NTASKS_PER_NODE='4')
    assert calls[0].startswith('srun [] ')


def test_slurm_requeues_after_status_75_only(tmp_path):
    status, calls, _ = slurm(tmp_path, 75)
    assert status == 75 and calls[1] == 'scontrol [] requeue 17'
    (tmp_path / 'log').unlink()
    assert len(slurm(tmp_path, 2)[1]) == 1
    (tmp_path / 'log').unlink()
    status, calls, stderr = slurm(tmp_path, 75, SLURM_RESTART_COUNT='3', MAX_RESTARTS='3')
    assert status == 75 and len(calls) == 1 and stderr.startswith('launch: the job was started again 3 times')


def test_slurm_requires_an_interpreter(tmp_path):
    status, calls, stderr = slurm(tmp_path, 0, PYTHON='/no/python')
    assert status == 2 and not calls and stderr.startswith('launch: PYTHON=/no/python is not a program')


# ---- several processes of one machine


def local(home: Path, program: str, count: int | str, *arguments: str, **environment: str) -> subprocess.Popen:
    """Starts launch/local.sh with a shell script as its interpreter; `$id` in the script is the process number."""
    read_id = 'for word in "$@"; do case $word in --process_id=*) id=${word#*=} ;; esac; done'
    python = executable(home / 'python', f'#!/usr/bin/env bash\ncd {home}\n{read_id}\n{program}\n')
    # A shell cannot trap a signal that was ignored when it started, as SIGINT is in the background of a script.
    exec_with_sigint = (
        'import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp("bash", sys.argv[1:])'
    )
    return subprocess.Popen(
        [*PYTHON, '-c', exec_with_sigint, 'bash', LAUNCH / 'local.sh', str(count), *arguments],
        env=os.environ | {'PYTHON': str(python), 'LOGS': str(home / 'logs')} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_files(home: Path, pattern: str, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(list(home.glob(pattern))) < count:
        assert time.monotonic() < deadline, f'{pattern} never came'
        time.sleep(0.02)


def test_local_passes_ids_and_coordinator_to_processes(tmp_path):
    process = local(
        tmp_path,
        'printf "%s\\n" "$@" "$JAX_NUM_CPU_DEVICES" >arguments-$id; echo says $id',
        3,
        *('--config=c', "--config.stages=('a b',)"),
        DEVICES_PER_PROCESS='2',
    )
    assert end(process) == (0, 'says 0\n')
    assert (tmp_path / 'logs' / 'process-2.log').read_text() == 'says 2\n'
    coordinators = set()
    for index in range(3):
        words = (tmp_path / f'arguments-{index}').read_text().splitlines()
        assert words[:3] == ['-m', 'aft_jax.main', '--distributed']
        assert words[4:] == [
            *('--num_processes=3', f'--process_id={index}', '--config=c', "--config.stages=('a b',)"),
            '2',
        ]
        coordinators.add(words[3])
    assert len(coordinators) == 1 and coordinators.pop().startswith('--coordinator=127.0.0.1:')


def test_local_ends_all_processes_when_one_fails(tmp_path):
    program = f'if [ $id = 1 ]; then echo why; exit 5; fi; trap "exit 75" TERM; {FOR_EVER}'
    status, stderr = end(local(tmp_path, program, 3))
    assert (status, stderr) == (5, 'launch: process 1 ended with exit status 5; ending the others.\nwhy\n')


def test_local_waits_for_processes_that_still_save(tmp_path):
    process = local(tmp_path, 'if [ $id = 1 ]; then exit 75; fi; sleep 1; touch saved; exit 75', 2)
    assert end(process) == (75, '') and (tmp_path / 'saved').exists()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_local_forwards_signals(tmp_path, number):
    program = f'trap "touch signal-$id; exit 75" {number.name}; touch up-$id; {FOR_EVER}'
    process = local(tmp_path, program, 3)
    wait_for_files(tmp_path, 'up-*', 3)
    process.send_signal(number)
    assert end(process) == (75, '') and len(list(tmp_path.glob('signal-*'))) == 3


def test_local_reports_mistakes_in_one_sentence(tmp_path):
    for count in ('', '0', '--config=c'):
        status, stderr = end(local(tmp_path, '', count))
        assert status == 2 and stderr.startswith('launch: ') and len(stderr.splitlines()) == 1
    status, stderr = end(local(tmp_path, '', 2, PYTHON='/no/python'))
    assert status == 2 and 'PYTHON=/no/python is not a program' in stderr


# ---- files that other programs read


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_pass_shellcheck(script):
    assert subprocess.run(['bash', '-n', script], check=False).returncode == 0
    shellcheck = shutil.which('shellcheck', path=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    assert shellcheck, "shellcheck is missing: pip install 'aft_jax[test]' brings it"
    done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_shell_scripts_are_all_found():
    assert [path.name for path in SCRIPTS] == ['local.sh', 'on_worker.sh', 'slurm.sh']


def test_jobset_is_consistent():
    document = yaml.safe_load((LAUNCH / 'jobset.yaml').read_text())
    claim = yaml.safe_load((LAUNCH / 'storage.yaml').read_text())
    assert document['apiVersion'] == 'jobset.x-k8s.io/v1alpha2' and document['kind'] == 'JobSet'
    spec = document['spec']
    assert spec['network']['enableDNSHostnames']
    assert spec['failurePolicy']['maxRestarts'] > 0
    jobs = {job['name']: job for job in spec['replicatedJobs']}
    rules = {rule['name']: rule for rule in spec['failurePolicy']['rules']}
    assert rules['mistake']['action'] == 'FailJobSet'
    assert rules['mistake']['onJobFailureReasons'] == ['PodFailurePolicy']
    assert set(rules['unprepared']['targetReplicatedJobs']) <= set(jobs)
    assert jobs['slice']['dependsOn'] == [{'name': 'prepare', 'status': 'Complete'}]
    for job in jobs.values():
        job_spec = job['template']['spec']
        pod = job_spec['template']['spec']
        assert job_spec['parallelism'] == job_spec['completions'] and job_spec['completionMode'] == 'Indexed'
        assert pod['restartPolicy'] == 'Never'  # podFailurePolicy allows no other
        (container,) = pod['containers']
        (mount,), (volume,) = container['volumeMounts'], pod['volumes']
        assert mount['name'] == volume['name']
        assert volume['persistentVolumeClaim']['claimName'] == claim['metadata']['name']
    job_spec = jobs['slice']['template']['spec']
    pod = job_spec['template']['spec']
    (container,) = pod['containers']
    assert container['command'] == ['python', '-m', 'aft_jax.main', '--distributed']
    flags = dict(word.split('=', 1) for word in container['args'])
    assert (ROOT / flags['--config']).is_file()
    assert flags['--workdir'].startswith(container['volumeMounts'][0]['mountPath'] + '/')
    assert (
        flags['--config.data.dir']
        == jobs['prepare']['template']['spec']['template']['spec']['containers'][0]['args'][1]
    )
    # Only a user's mistake ends the job. After any other failure JobSet restarts all pods.
    assert job_spec['backoffLimit'] == 0
    codes = [rule['onExitCodes'] for rule in job_spec['podFailurePolicy']['rules'] if rule['action'] == 'FailJob']
    assert codes == [{'containerName': container['name'], 'operator': 'In', 'values': [2]}]
    width, height = map(int, pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x'))
    assert job_spec['parallelism'] * container['resources']['limits']['google.com/tpu'] == width * height
    assert claim['spec']['accessModes'] == ['ReadWriteMany']


def test_dockerfile_copies_existing_files():
    for line in (LAUNCH / 'Dockerfile').read_text().splitlines():
        if line.startswith('COPY '):
            assert all((ROOT / word).exists() for word in line.split()[1:-1]), line
