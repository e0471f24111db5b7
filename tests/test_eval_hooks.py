"""Evaluation hooks: when they are called, that they change nothing, and that a resumed run has the same record."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from aft_jax import experiment
from aft_jax.errors import UserError
from aft_jax.evaluation.scores import score
from aft_jax.training import loop, state
from aft_jax.training.loop import fit
from aft_jax.training.optimiser import sgd
from aft_jax.training.stage import EvalHook, EvalPoint, Phase, TrainingStage
from aft_jax.validation import validate

STEPS = 10
EVALUATED = [0, 3, 6, 9, 10]  # ten steps in four parts


class Interrupted(Exception):
    """Stands for a process that dies."""


def wander(current, batch, key):
    """A step that depends on everything a step is given, and is compiled in no time."""
    push = batch['images'].mean() + jax.random.normal(key)
    params = jax.tree.map(lambda p: p + push, current.params)
    return current.replace(step=current.step + 1, params=params), {'loss': push}


@pytest.fixture
def train(dataset):
    """Returns a function that takes ten steps of `wander`."""

    def call(run, **options):
        optimiser = sgd(0.1, 'constant', STEPS, momentum=0.9, weight_decay=5e-4)
        before = state.create({'params': {'w': np.zeros(3, np.float32)}}, optimiser)
        arrays = {'images': dataset.train_images, 'labels': dataset.train_labels}
        return fit(run, TrainingStage('purify/ft', before, [Phase(wander, STEPS)], arrays, 8, **options))

    return call


def hooked(run, dies_at=None):
    def evaluate(point):
        if point.step == dies_at:
            raise Interrupted
        assert int(point.state.step) == point.step and point.stage == 'purify/ft'
        return {'epoch': point.epochs, 'test_acc': float(point.state.params['w'][0])}

    return run._replace(eval_hook=EvalHook(evaluate, points=4, at_start=True))


def lines(run):
    return [json.loads(line) for line in (run.workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.parametrize('every', [4, 1000])
def test_eval_hook_record_of_a_resumed_run_is_that_of_an_uninterrupted_run(train, make_run, assert_trees_close, every):
    plain, whole, cut = (make_run(name, 1, checkpoint_every=every) for name in ('plain', 'whole', 'cut'))
    expected = train(plain)
    assert_trees_close(train(hooked(whole)).state, expected.state)
    with pytest.raises(Interrupted):
        train(hooked(cut, dies_at=6))
    resumed = train(hooked(cut))
    assert_trees_close(resumed.state, expected.state)
    assert lines(cut) == lines(whole)
    evaluated = [line for line in lines(whole) if 'test_acc' in line]
    assert [line['step'] for line in evaluated] == EVALUATED
    np.testing.assert_allclose([line['epoch'] for line in evaluated], np.array(EVALUATED) * 8 / 80)
    assert [line for line in lines(whole) if 'loss' in line] == lines(plain)
    assert train(hooked(cut)).seconds == resumed.seconds and lines(cut) == lines(whole)  # it has ended


def test_eval_hook_time_is_not_counted_as_training(train, make_run, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(loop, 'time', SimpleNamespace(monotonic=lambda: clock[0]))

    def evaluate(_):
        clock[0] += 100
        return {}

    run = make_run()._replace(eval_hook=EvalHook(evaluate, points=4, at_start=True))
    assert train(run).seconds == 0
    assert clock[0] == 100 * len(EVALUATED)


def test_eval_hook_of_the_run_is_not_called_for_a_stage_without_a_model(train, make_run):
    def evaluate(_):
        raise AssertionError('there is no model to evaluate')

    train(make_run()._replace(eval_hook=EvalHook(evaluate)), trains_model=False)


def test_eval_hook_of_a_stage_and_of_the_run_are_both_called(train, make_run):
    run = make_run()._replace(eval_hook=EvalHook(lambda point: {'of_run': point.step}, points=2))
    train(run, eval_hooks=(EvalHook(lambda point: {'of_stage': point.step}, every_steps=4),))
    found = {name: [line['step'] for line in lines(run) if name in line] for name in ('of_run', 'of_stage')}
    assert found == {'of_run': [5, 10], 'of_stage': [4, 8, 10]}


def test_with_eval_hook_writes_the_test_scores_of_a_defense(make_run):
    labels = np.array([0, 1, 2, 3])
    answers = {'clean': np.array([0, 1, 2, 0]), 'triggered': np.array([0, 0, 2, 0])}

    def evaluate(variables, attack):
        predictions = answers['triggered'] if attack else None
        return score(answers['clean'], predictions, labels, np.zeros(4, int) if attack else None, 4)

    run = make_run(purify_points=5)
    for attack, asr in ((object(), {'test_asr': pytest.approx(2 / 3)}), (None, {})):
        hook = experiment.with_eval_hook(run, SimpleNamespace(evaluate=evaluate), attack).eval_hook
        assert hook.points == 5 and hook.at_start
        point = EvalPoint('purify/aft', 7, 0.5, SimpleNamespace(variables={}))
        assert hook.evaluate(point) == {'epoch': 0.5, 'test_acc': 0.75} | asr
    assert experiment.with_eval_hook(make_run('other'), SimpleNamespace(), None).eval_hook is None


def test_validate_refuses_a_wrong_number_of_purify_points(config):
    config.run.purify_points = -1
    with pytest.raises(UserError, match=r'run\.purify_points=-1'):
        validate(config)
