"""Tests that the benchmarks compare equal computations, and that a comparison runs to its end."""

import csv

import numpy as np
import pytest

from aft_jax.config import AFT_PRESETS
from aft_jax.errors import UserError
from benchmarks import agreement, compare, record, task, timing
from benchmarks.ours import Ours

torch = pytest.importorskip('torch', reason='torch is not installed')
import torch_models  # noqa: E402, F401  (sets its threads)

from benchmarks.torch_reference import Released, Tuned  # noqa: E402

BATCH = 8


@pytest.fixture(scope='module', autouse=True)
def short_pgd():
    """Shortens PGD, which compiles faster. The second step leaves the ball and is projected back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AFT_PRESETS, 'released', AFT_PRESETS['released'] | {'pgd_steps': 2, 'step_size': 4 / 255})
        yield


@pytest.fixture(scope='module')
def on(short_pgd):
    # Without dropout, which draws different numbers on each side.
    return task.make('mnist_cnn', task.read('mnist_cnn', '', 2 * BATCH), BATCH, 'float32', dropout=0.0)


@pytest.fixture(scope='module')
def ours(on):
    return Ours(on)


@pytest.fixture(scope='module')
def after_a_step(on, ours):
    """Our weights after the first step of AFT, under torch's names."""
    ours.work('aft_step').run(1)
    return on._replace(variables=ours.trainings['aft'].state.variables).torch_weights()


@pytest.mark.parametrize('theirs_of', [Released, Tuned])
def test_baselines_agree_in_logits_examples_and_weights_after_a_step(on, ours, after_a_step, theirs_of):
    theirs, batch = theirs_of(on, 'cpu'), task.first_batch(on)
    differences = agreement.compare(ours, theirs, *batch)
    assert differences.logits < 1e-5 and differences.pixels == 0
    assert np.abs(ours.examples(*batch) - batch[0]).max() == pytest.approx(6 / 255, rel=1e-4)

    theirs.work('aft_step').run(1)
    for name, tensor in theirs.model.network.state_dict().items():
        if not name.endswith('num_batches_tracked'):
            # Most weights move by 1e-4 in this step. torch's variance is the unbiased one, of 392 numbers or more.
            allowed = 1e-3 if name.endswith('running_var') else 1e-6
            np.testing.assert_allclose(after_a_step[name], tensor, rtol=0, atol=allowed, err_msg=name)


def test_require_refuses_one_changed_weight(on, ours):
    theirs = Released(on, 'cpu')
    with torch.no_grad():
        theirs.model.network.linear9.bias[0] += 1e-3
    with pytest.raises(UserError, match='do not agree, so nothing is timed: logits differ by'):
        agreement.require('theirs', agreement.compare(ours, theirs, *task.first_batch(on)), agreement.EXACT)


def test_compare_runs_from_flags_to_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, 'ceilings', lambda _: {'float32': record.Ceiling(1e9, 1e9)})
    monkeypatch.setattr(timing, 'LEAST_SECONDS', 0.0)
    monkeypatch.setattr(timing, 'REST_SECONDS', 0.0)
    monkeypatch.setattr(timing.gc, 'collect', lambda: 0)
    monkeypatch.setattr(compare.os, 'sched_getaffinity', lambda _: {0})  # as many threads as other tests
    out = tmp_path / 'benchmarks.csv'
    flags = ['--models=mnist_cnn', f'--batch={BATCH}', f'--images={2 * BATCH}', '--variants=eager', f'--out={out}']
    assert compare.main([*flags, '--benchmarks=evaluation,infecting_epoch', '--alternations=2']) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    names = ['mnist_cnn/evaluation', f'mnist_cnn/infecting_epoch of {2 * BATCH}']
    assert [(r['benchmark'], r['baseline']) for r in rows] == [
        (n, b) for n in names for b in ('released', 'tuned, eager')
    ]
    for r in rows:
        ratios = [float(r[f'ratio_{name}']) for name in ('min', 'median', 'max')]
        assert 0 < ratios[0] <= ratios[1] <= ratios[2]
    printed = capsys.readouterr().out
    assert 'released agrees' in printed and 'tuned, eager agrees' in printed
