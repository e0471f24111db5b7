"""A run that is killed at random moments, and resumed, ends exactly as one that was never interrupted."""

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import final_arrays
from command import ROOT, start

KILLS = 3
LONGEST = 180


@pytest.fixture
def arguments(tmp_path):
    generator = np.random.default_rng(5)
    labels = np.arange(512) % 4
    images = generator.integers(0, 200, (512, 12, 12, 1)) + 14 * labels[:, None, None, None]
    np.savez(
        tmp_path / 'data.npz',
        train_images=images[:448].astype(np.uint8),
        train_labels=labels[:448],
        test_images=images[448:].astype(np.uint8),
        test_labels=labels[448:],
    )
    return [
        f'--config={ROOT}/configs/quickstart.py',
        f'--config.dataset=npz:{tmp_path}/data.npz',
        '--config.batch_size=16',
        '--config.clean_share=0.2',
        '--config.train.epochs=6',
        '--config.ft.epochs=10',
        '--config.aft.epochs=10',
        '--config.aft.adversarial_epochs=5',
        '--config.aft.pgd_steps=2',
        '--config.run.log_every=5',
        '--config.run.checkpoint_every=20',
    ]


def begin(arguments: list[str], workdir: Path, log: Path) -> subprocess.Popen:
    return start([*arguments, f'--workdir={workdir}'], log)


def finish(arguments: list[str], workdir: Path, log: Path) -> None:
    """Runs to the end."""
    assert begin(arguments, workdir, log).wait(timeout=LONGEST) == 0, log.read_text()


def kill_after(lines: int, arguments: list[str], workdir: Path, log: Path) -> None:
    """Starts a run, and kills it when it has written so many lines of metrics."""
    process = begin(arguments, workdir, log)
    deadline = time.monotonic() + LONGEST
    while count_lines(workdir) < lines:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def count_lines(workdir: Path) -> int:
    path = workdir / 'metrics.jsonl'
    return path.read_bytes().count(b'\n') if path.exists() else 0


def without_times(results: dict) -> dict:
    """Returns results.json less the one thing that no two runs share: seconds."""
    return {k: without_times(v) if isinstance(v, dict) else v for k, v in results.items() if k != 'seconds'}


def test_killed_at_random_moments(arguments, tmp_path):
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    finish(arguments, whole, tmp_path / 'whole.log')
    total = count_lines(whole)
    # One moment in each third of the work, so that every stage of the run is met.
    generator = np.random.default_rng(1)
    for third in range(KILLS):
        moment = int(generator.uniform(third, third + 1) / KILLS * (total - 1)) + 1
        kill_after(moment, arguments, broken, tmp_path / 'broken.log')
    assert not (broken / 'results.json').exists()
    finish(arguments, broken, tmp_path / 'broken.log')

    read = [without_times(json.loads((d / 'results.json').read_text())) for d in (whole, broken)]
    assert read[0] == read[1]
    assert read[0]['purified'].keys() == {'ft', 'aft'}
    for stage in ('infect', 'purify/ft', 'purify/aft'):
        expected, found = (final_arrays(d / 'checkpoints' / stage) for d in (whole, broken))
        assert expected.keys() == found.keys() and any('kernel' in name for name in expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(array, found[name], err_msg=f'{stage}{name}', strict=True)
    lines = [(d / 'metrics.jsonl').read_text().splitlines() for d in (whole, broken)]
    assert sorted(lines[0]) == sorted(lines[1])

    # Once more: everything is there, so nothing is trained and nothing changes.
    results = (broken / 'results.json').read_text()
    finish(arguments, broken, tmp_path / 'broken.log')
    assert (broken / 'results.json').read_text() == results
    assert (broken / 'metrics.jsonl').read_text().splitlines() == lines[1]
