"""A run that is killed at random moments, and resumed, ends exactly as one that was never interrupted."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import final_arrays
from command import ROOT, start
from toys import save_brightness_dataset

# One kill is in each of these parts of the work.
PARTS = (('infect', 'purify/ft'), ('purify/aft/reference',), ('purify/aft/adversarial',))
LONGEST = 180


@pytest.fixture
def arguments(tmp_path):
    save_brightness_dataset(tmp_path / 'data.npz')
    return [
        f'--config={ROOT}/configs/quickstart.py',
        f'--config.dataset=npz:{tmp_path}/data.npz',
        '--config.batch_size=16',
        '--config.clean_share=0.2',
        '--config.train.epochs=3',
        '--config.ft.epochs=4',
        '--config.model.factory=tests.toys:small_network',
        '--config.aft.reference_steps=25',
        '--config.aft.steps=25',
        '--config.aft.pgd_steps=1',
        '--config.aft.universal=linf,rectangle',
        '--config.aft.per_image=linf',
        "--config.stages=('infect', 'purify')",
        '--config.run.log_every=5',
        '--config.run.checkpoint_every=10',
    ]


def finish(arguments: list[str], workdir: Path, log: Path) -> None:
    """Runs to the end; nothing is left in the system's temporary directory."""
    temporary = log.parent / 'temporary'
    temporary.mkdir(exist_ok=True)
    process = start([*arguments, f'--workdir={workdir}'], log, TMPDIR=str(temporary))
    assert process.wait(timeout=LONGEST) == 0, log.read_text()
    assert not list(temporary.iterdir())


def kill_after(lines: int, arguments: list[str], workdir: Path, log: Path) -> None:
    """Starts a run, and kills it when it has written so many lines of metrics."""
    process = start([*arguments, f'--workdir={workdir}'], log)
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
    """Removes the seconds, which differ between runs, from results.json."""
    return {k: without_times(v) if isinstance(v, dict) else v for k, v in results.items() if k != 'seconds'}


def test_main_killed_at_random_moments_resumes_exactly(arguments, tmp_path):
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    finish(arguments, whole, tmp_path / 'whole.log')
    stages = [json.loads(line)['stage'] for line in (whole / 'metrics.jsonl').read_text().splitlines()]
    generator = np.random.default_rng(1)
    for part in PARTS:
        moment = generator.choice([count for count, stage in enumerate(stages, start=1) if stage in part])
        kill_after(moment, arguments, broken, tmp_path / 'broken.log')
    assert not (broken / 'results.json').exists()
    finish(arguments, broken, tmp_path / 'broken.log')

    read = [without_times(json.loads((d / 'results.json').read_text())) for d in (whole, broken)]
    assert read[0] == read[1]
    assert read[0]['purified'].keys() == {'ft', 'aft'}
    for stage in sum(PARTS, ()):
        expected, actual = (final_arrays(d / 'checkpoints' / stage) for d in (whole, broken))
        assert expected.keys() == actual.keys() and any('kernel' in name for name in expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(array, actual[name], err_msg=f'{stage}{name}', strict=True)
    lines = [(d / 'metrics.jsonl').read_text().splitlines() for d in (whole, broken)]
    assert sorted(lines[0]) == sorted(lines[1])

    # A finished run is started again: nothing is trained and nothing changes.
    results = (broken / 'results.json').read_text()
    finish(arguments, broken, tmp_path / 'broken.log')
    assert (broken / 'results.json').read_text() == results
    assert (broken / 'metrics.jsonl').read_text().splitlines() == lines[1]
