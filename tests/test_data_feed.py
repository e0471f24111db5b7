"""Data on the devices and data on the hosts are the same data; and the sign to stop loses nothing."""

import json
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aft_jax.data.order import Order
from aft_jax.errors import UserError
from aft_jax.runtime.preemption import Preempted, Watch
from aft_jax.runtime.sharding import make_mesh
from aft_jax.training import data_feed, state
from aft_jax.training.loop import Phase, TrainingStage, fit
from aft_jax.training.optimiser import sgd

STEPS = 11


@pytest.fixture
def train(make_run, dataset, tiny_variables):
    """Returns a function that runs a stage whose state and metrics tell all that its steps were given."""

    def wander(current, batch, key):
        both = jnp.stack(
            [
                jnp.mean(b['images'] * (1 + b['labels'].astype(jnp.float32))[:, None, None, None])
                for b in (batch, batch['second'])
            ]
        )
        kick = jax.random.uniform(key) + both @ jnp.asarray([1.0, 10.0])
        after = current.replace(step=current.step + 1, params=jax.tree.map(lambda p: 0.9 * p + kick, current.params))
        return after, {'loss': kick, 'step_number': current.step.astype(jnp.float32)}

    def call(run):
        arrays = {'images': dataset.train_images, 'labels': dataset.train_labels}
        start = state.create(tiny_variables, sgd(0.1, 'constant', 1, momentum=0.9, weight_decay=5e-4))
        fitted = fit(run, TrainingStage('infect', start, [Phase(wander, STEPS)], arrays, 8, num_streams=2))
        lines = [json.loads(line) for line in (run.workdir / 'metrics.jsonl').read_text().splitlines()]
        return fitted.state, lines

    return call


@pytest.mark.parametrize('devices', [1, 4])
@pytest.mark.parametrize('chunk', [1, 2])
def test_host_placement_equals_device_placement(train, make_run, assert_trees_close, devices, chunk):
    options = {'devices': devices, 'steps_per_call': chunk, 'log_every': 3, 'checkpoint_every': 5}
    (on_device, first), (on_host, second) = (train(make_run(p, placement=p, **options)) for p in ('device', 'host'))
    assert_trees_close(on_host, on_device)
    assert first == second and len(first) == 6


def test_a_host_feed_hands_over_the_shares_of_the_devices(dataset):
    arrays = {'images': dataset.train_images, 'labels': dataset.train_labels}
    order = Order(0, 'x', len(dataset.train_labels), 8)
    fed = data_feed.Feed(make_mesh(), arrays, [order], 'host')
    assert fed.data is None
    with fed.calls([(0, 2), (2, 3)]) as calls:
        first, second = calls
    assert first['images'].shape == (2, 1, 8, 8, 8, 1) and second['labels'].shape == (1, 1, 8)
    np.testing.assert_array_equal(first['images'][1, 0], dataset.train_images[order.batch(1)])
    np.testing.assert_array_equal(second['labels'][0, 0], dataset.train_labels[order.batch(2)])
    assert {shard.data.shape[2] for shard in first['images'].addressable_shards} == {2}


def test_an_error_while_gathering_ahead_is_raised():
    def make(span):
        if span == (2, 3):
            raise OSError('the disk is gone')
        return span

    with data_feed.ahead(make, [(i, i + 1) for i in range(9)]) as made:
        assert [next(made), next(made)] == [(0, 1), (1, 2)]
        with pytest.raises(OSError, match='disk'):
            next(made)


def test_gathering_ahead_ends_when_nobody_takes_it():
    with data_feed.ahead(lambda span: span, [(i, i + 1) for i in range(1000)]) as made:
        assert next(made) == (0, 1)  # leaving joins the thread, or this test hangs


class StopsAt(Watch):
    """A watch that says stop once, after so many looks."""

    def __init__(self, look):
        super().__init__()
        self.looks, self.look = 0, look

    def must_stop(self):
        self.looks += 1
        return self.looks == self.look


@pytest.mark.parametrize('look', [1, 3, 5, 10])
def test_stopped_and_resumed_equals_uninterrupted(train, make_run, assert_trees_close, look):
    """The state, and the metrics of steps that had not come to a line yet."""
    options = {'log_every': 4, 'checkpoint_every': 100}
    expected, lines = train(make_run('whole', **options))
    run = make_run('cut', **options)._replace(watch=StopsAt(look))
    with pytest.raises(Preempted):
        train(run)
    found, others = train(run)
    assert_trees_close(found, expected)
    assert others == lines and [line['step'] for line in lines] == [4, 8, 11]


def test_the_last_step_is_not_stopped(train, make_run):
    run = make_run(checkpoint_every=100)._replace(watch=StopsAt(STEPS))
    assert int(train(run)[0].step) == STEPS


def test_a_broken_state_is_not_saved_at_the_sign_to_stop(make_run, dataset, tiny_variables):
    def broken(current, batch, key):
        return current.replace(step=current.step + 1), {'loss': jnp.full((), jnp.nan)}

    run = make_run(log_every=100)._replace(watch=StopsAt(2))
    arrays = {'images': dataset.train_images, 'labels': dataset.train_labels}
    start = state.create(tiny_variables, sgd(0.1, 'constant', 1, momentum=0.9, weight_decay=5e-4))
    with pytest.raises(UserError, match='no longer a finite number'):
        fit(run, TrainingStage('infect', start, [Phase(broken, STEPS)], arrays, 8))
    assert not any(path.name.isdigit() for path in (run.workdir / 'checkpoints/infect').iterdir())


def test_another_thread_is_left_alone():
    def watch():
        with Watch() as watch:
            seen.append(watch.must_stop())

    seen: list[bool] = []
    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert seen == [False]


def test_sigterm_is_noted_and_the_handler_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Watch() as watch:
        assert not watch.must_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.must_stop()
    assert signal.getsignal(signal.SIGTERM) is before
