"""Runs of two processes with two devices each over loopback, which give the results of one process.

They are stopped by SIGTERM and resumed, one of them is killed, and one device resumes a checkpoint of four.
"""

import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import final_arrays
from command import ROOT, start
from toys import save_brightness_dataset

from aft_jax.cli import EXIT_PREEMPTED, EXIT_USER_ERROR

LONGEST = 240
NO_PICTURES = "--config.stages=('infect', 'purify')"
STAGES = ('infect', 'purify/aft/reference', 'purify/aft/adversarial')


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """A folder with the data set."""
    path = tmp_path_factory.mktemp('distributed')
    save_brightness_dataset(path / 'data.npz')
    return path


def launch(
    folder: Path, workdir: str, processes: int, devices: int, *more: str, slurm: bool = False
) -> list[subprocess.Popen]:
    """Starts a run of several processes with several devices each; the output of process i goes to WORKDIR.i.log.

    The processes find each other by flags, or as the tasks of a SLURM job.
    """
    arguments = [
        f'--config={ROOT}/configs/quickstart.py',
        f'--workdir={folder / workdir}',
        f'--config.dataset=npz:{folder}/data.npz',
        '--config.defenses=aft',
        '--config.batch_size=16',
        '--config.clean_share=0.2',
        '--config.train.epochs=2',
        '--config.model.factory=tests.toys:small_network',
        '--config.aft.reference_steps=8',
        '--config.aft.steps=8',
        '--config.aft.pgd_steps=1',
        '--config.aft.universal=linf,rectangle',
        '--config.aft.per_image=linf',
        '--config.run.log_every=3',
        '--config.run.checkpoint_every=6',
        *more,
    ]
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    started = []
    for i in range(processes):
        joins = [
            '--distributed',
            f'--coordinator=127.0.0.1:{port}',
            f'--num_processes={processes}',
            f'--process_id={i}',
        ]
        job = {
            'SLURM_JOB_ID': str(port),  # JAX derives the coordinator's port from it
            'SLURM_STEP_NODELIST': 'localhost',
            'SLURM_NTASKS': str(processes),
            'SLURM_PROCID': str(i),
            'SLURM_LOCALID': str(i),
        }
        log = folder / f'{workdir}.{i}.log'
        flags = arguments + (['--distributed'] if slurm else joins if processes > 1 else [])
        started.append(start(flags, log, JAX_NUM_CPU_DEVICES=str(devices), **(job if slurm else {})))
    return started


def finish(processes: list[subprocess.Popen]) -> list[int]:
    """Waits for all processes and returns their exit statuses."""
    deadline = time.monotonic() + LONGEST
    try:
        return [process.wait(timeout=max(1.0, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def wait_for_checkpoint(directory: Path, processes: list[subprocess.Popen]) -> None:
    """Waits for a new checkpoint."""
    deadline = time.monotonic() + LONGEST
    earlier = steps(directory)
    while not steps(directory) - earlier:
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.02)


def steps(directory: Path) -> set[str]:
    return {path.name for path in directory.glob('*') if path.name.isdigit()}


def output(folder: Path, workdir: str, process: int = 0) -> str:
    """Reads the output of a process."""
    return (folder / f'{workdir}.{process}.log').read_text()


@pytest.fixture(scope='module')
def one(folder) -> Path:
    """The work directory of an uninterrupted run of one process with one device."""
    assert finish(launch(folder, 'one', 1, 1, NO_PICTURES)) == [0], output(folder, 'one')
    return folder / 'one'


def assert_same_outcome(expected: Path, actual: Path) -> None:
    scores = [json.loads((directory / 'results.json').read_text()) for directory in (expected, actual)]
    for part in (lambda r: r['infected'], lambda r: r['purified']['aft']):
        first, second = ({k: v for k, v in part(r).items() if k in ('acc', 'asr', 'ra', 'per_class')} for r in scores)
        assert first == second
    for stage in STAGES:
        arrays, others = (final_arrays(directory / 'checkpoints' / stage) for directory in (expected, actual))
        assert arrays.keys() == others.keys() and any('kernel' in name for name in arrays)
        for name, array in arrays.items():
            np.testing.assert_allclose(others[name], array, rtol=0, atol=1e-5, err_msg=f'{stage}{name}', strict=True)


@pytest.fixture(scope='module')
def orphan(folder) -> Iterator[list[subprocess.Popen]]:
    """A run of two processes, one of which is killed; the other notices after `processes.HEARTBEAT_SECONDS`.

    Other tests run during this time.
    """
    processes = launch(folder, 'dying', 2, 1, '--config.train.epochs=500')
    wait_for_checkpoint(folder / 'dying/checkpoints/infect', processes)
    processes[1].kill()
    yield processes
    processes[0].kill()


@pytest.mark.usefixtures('orphan')
def test_slurm_job_prints_a_user_error_once(folder):
    """The tasks have found each other, because only process 0 prints the error."""
    name = 'wrong'
    processes = launch(folder, name, 2, 1, '--config.dataset=npz:nowhere.npz', slurm=True)
    assert finish(processes) == [EXIT_USER_ERROR] * 2, output(folder, name)
    assert output(folder, name).count('aft_jax: ') == 1 and 'aft_jax: ' not in output(folder, name, 1)
    assert 'nowhere.npz' in output(folder, name) and 'Traceback' not in output(folder, name)


def test_two_processes_stopped_and_resumed_equal_one(folder, one):
    checkpoints = folder / 'two/checkpoints/infect'
    processes = launch(folder, 'two', 2, 2)
    wait_for_checkpoint(checkpoints, processes)
    processes[1].send_signal(signal.SIGTERM)  # one process gets the signal, and both stop
    assert finish(processes) == [EXIT_PREEMPTED] * 2, output(folder, 'two') + output(folder, 'two', 1)
    assert 'Stopped by SIGTERM' in output(folder, 'two') and 'Stopped by SIGTERM' not in output(folder, 'two', 1)
    assert not (folder / 'two/results.json').exists()

    assert finish(launch(folder, 'two', 2, 2)) == [0, 0], output(folder, 'two') + output(folder, 'two', 1)
    assert_same_outcome(one, folder / 'two')
    environment = json.loads((folder / 'two/results.json').read_text())['environment']
    assert (environment['devices'], environment['processes']) == (4, 2)
    assert (folder / 'two/report/before_after.png').exists()
    # Process 0 alone writes.
    assert 'ACC' in output(folder, 'two') and 'ACC' not in output(folder, 'two', 1)
    lines = (folder / 'two/metrics.jsonl').read_text().splitlines()
    assert len(lines) == len((one / 'metrics.jsonl').read_text().splitlines()) == len(set(lines))


def test_one_device_resumes_a_checkpoint_of_four(folder, one):
    processes = launch(folder, 'four', 1, 4, NO_PICTURES)
    wait_for_checkpoint(folder / 'four/checkpoints/infect', processes)
    processes[0].send_signal(signal.SIGTERM)
    assert finish(processes) == [EXIT_PREEMPTED], output(folder, 'four')
    assert not (folder / 'four/results.json').exists()
    assert finish(launch(folder, 'four', 1, 1, NO_PICTURES)) == [0], output(folder, 'four')
    assert_same_outcome(one, folder / 'four')


def test_process_ends_when_another_one_dies(orphan):
    assert finish(orphan)[0] not in (0, EXIT_PREEMPTED)
