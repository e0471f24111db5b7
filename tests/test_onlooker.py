"""Who looks on while a defense trains: when, that it changes nothing, and that a resumed run has the same record."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from aft_jax import experiment
from aft_jax.errors import UserError
from aft_jax.evaluation.scores import score
from aft_jax.training import loop, state
from aft_jax.training.loop import Onlooker, Phase, fit
from aft_jax.training.optimiser import sgd
from aft_jax.validation import validate

STEPS = 10
LOOKED_AT = [0, 3, 6, 9, 10]  # ten steps in four parts


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

    def call(run):
        optimiser = sgd(0.1, 'constant', STEPS)
        before = state.create({'params': {'w': np.zeros(3, np.float32)}}, optimiser)
        arrays = {'images': dataset.train_images, 'labels': dataset.train_labels}
        return fit(run, 'purify/ft', before, [Phase(wander, STEPS)], arrays, 8)

    return call


def onlooker(run, dies_at=None):
    def look(stage, step, epochs, current):
        if step == dies_at:
            raise Interrupted
        assert int(current.step) == step
        run.writer.write(stage, step, {'epoch': epochs, 'test_acc': float(current.params['w'][0])})

    return run._replace(onlooker=Onlooker(look, 4))


def lines(run):
    return [json.loads(line) for line in (run.workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.parametrize('every', [4, 1000])
def test_a_resumed_record_is_that_of_an_uninterrupted_run(train, make_run, assert_trees_close, every):
    plain, whole, cut = (make_run(name, 1, checkpoint_every=every) for name in ('plain', 'whole', 'cut'))
    expected = train(plain)
    assert_trees_close(train(onlooker(whole)).state, expected.state)
    with pytest.raises(Interrupted):
        train(onlooker(cut, dies_at=6))
    resumed = train(onlooker(cut))
    assert_trees_close(resumed.state, expected.state)
    assert lines(cut) == lines(whole)
    looked = [line for line in lines(whole) if 'test_acc' in line]
    assert [line['step'] for line in looked] == LOOKED_AT
    np.testing.assert_allclose([line['epoch'] for line in looked], np.array(LOOKED_AT) * 8 / 80)
    assert [line for line in lines(whole) if 'loss' in line] == lines(plain)
    assert train(onlooker(cut)).seconds == resumed.seconds and lines(cut) == lines(whole)  # it has ended


def test_looking_on_is_not_counted_as_work(train, make_run, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(loop, 'time', SimpleNamespace(monotonic=lambda: clock[0]))

    def look(*_):
        clock[0] += 100

    assert train(make_run()._replace(onlooker=Onlooker(look, 4))).seconds == 0
    assert clock[0] == 100 * len(LOOKED_AT)


def test_the_judge_writes_and_tells_nothing(make_run):
    labels = np.array([0, 1, 2, 3])
    answers = {'clean': np.array([0, 1, 2, 0]), 'triggered': np.array([0, 0, 2, 0])}

    def judge(variables, attack):
        said = answers['triggered'] if attack else None
        return score(answers['clean'], said, labels, np.zeros(4, int) if attack else None, 4)

    run = make_run(purify_points=5)
    for attack in (object(), None):
        watched = experiment.watched(run, judge, attack)
        assert watched.onlooker.points == 5
        assert watched.onlooker.look('purify/aft', 7, 0.5, SimpleNamespace(variables={})) is None
        assert watched.onlooker.look('purify/anp', 7, 0.5, SimpleNamespace(masks={})) is None
    record = {'step': 7, 'stage': 'purify/aft', 'epoch': 0.5, 'test_acc': 0.75}
    assert lines(run) == [record | {'test_asr': pytest.approx(2 / 3)}, record]
    assert experiment.watched(make_run('other'), judge, None).onlooker is None


def test_a_wrong_number_of_points(config):
    config.run.purify_points = -1
    with pytest.raises(UserError, match=r'run\.purify_points=-1'):
        validate(config)
