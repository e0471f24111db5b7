"""Data placed on the devices or on the hosts give the same batches, and a stop by SIGTERM loses nothing."""

import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import lines

from aft_jax.data.order import Order
from aft_jax.errors import Preempted, UserError
from aft_jax.runtime.preemption import Watch
from aft_jax.runtime.sharding import make_mesh
from aft_jax.training import data_feed, state
from aft_jax.training.loop import fit
from aft_jax.training.optimiser import sgd
from aft_jax.training.stage import Phase, TrainingStage

STEPS = 11


@pytest.fixture
def train(make_run, dataset, tiny_variables):
    """A function that runs a stage whose state and metrics depend on all arguments of its steps."""

    def two_stream_step(current, batch, key):
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
        fitted = fit(run, TrainingStage('infect', start, [Phase(two_stream_step, STEPS)], arrays, 8, num_streams=2))
        return fitted.state, lines(run)

    return call


@pytest.mark.parametrize('devices', [1, 4])
@pytest.mark.parametrize('chunk', [1, 2])
def test_feed_on_hosts_equals_feed_on_devices(train, make_run, assert_trees_close, devices, chunk):
    options = {'devices': devices, 'steps_per_call': chunk, 'log_every': 3, 'checkpoint_every': 5}
    (on_device, first), (on_host, second) = (train(make_run(p, placement=p, **options)) for p in ('device', 'host'))
    assert_trees_close(on_host, on_device)
    assert first == second and len(first) == 6


def test_feed_on_hosts_splits_batches_among_devices(dataset):
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


def test_ahead_raises_errors_of_its_thread():
    def make(span):
        if span == (2, 3):
            raise OSError('the disk is gone')
        return span

    with data_feed.ahead(make, [(i, i + 1) for i in range(9)]) as made:
        assert [next(made), next(made)] == [(0, 1), (1, 2)]
        with pytest.raises(OSError, match='disk'):
            next(made)


def test_ahead_ends_when_its_results_are_not_taken():
    with data_feed.ahead(lambda span: span, [(i, i + 1) for i in range(1000)]) as made:
        assert next(made) == (0, 1)  # leaving joins the thread, or this test hangs


class StopsAt(Watch):
    """A watch that stops once, at the n-th check."""

    def __init__(self, check):
        super().__init__()
        self.num_checks, self.check = 0, check

    def must_stop(self):
        self.num_checks += 1
        return self.num_checks == self.check


@pytest.mark.parametrize('check', [1, 3, 5, 10])
def test_fit_stopped_and_resumed_equals_uninterrupted(train, make_run, assert_trees_close, check):
    """The state is the same, and so are the metrics of steps that were not logged before the stop."""
    options = {'log_every': 4, 'checkpoint_every': 100}
    expected, whole_lines = train(make_run('whole', **options))
    run = make_run('cut', **options)._replace(watch=StopsAt(check))
    with pytest.raises(Preempted):
        train(run)
    resumed, resumed_lines = train(run)
    assert_trees_close(resumed, expected)
    assert resumed_lines == whole_lines and [line['step'] for line in whole_lines] == [4, 8, 11]


def test_fit_does_not_stop_at_its_last_step(train, make_run):
    run = make_run(checkpoint_every=100)._replace(watch=StopsAt(STEPS))
    assert int(train(run)[0].step) == STEPS


def test_fit_does_not_save_a_broken_state_when_stopped(make_run, dataset, tiny_variables):
    def broken(current, batch, key):
        return current.replace(step=current.step + 1), {'loss': jnp.full((), jnp.nan)}

    run = make_run(log_every=100)._replace(watch=StopsAt(2))
    arrays = {'images': dataset.train_images, 'labels': dataset.train_labels}
    start = state.create(tiny_variables, sgd(0.1, 'constant', 1, momentum=0.9, weight_decay=5e-4))
    with pytest.raises(UserError, match='no longer a finite number'):
        fit(run, TrainingStage('infect', start, [Phase(broken, STEPS)], arrays, 8))
    assert not any(path.name.isdigit() for path in (run.workdir / 'checkpoints/infect').iterdir())


def test_watch_in_another_thread_handles_no_signals():
    def watch():
        with Watch() as watch:
            answers.append(watch.must_stop())

    answers: list[bool] = []
    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert answers == [False]


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGHUP'])
def test_watch_notes_a_signal_and_restores_the_handler(name):
    number = signal.Signals[name]
    # Under nohup SIGHUP is ignored.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with Watch() as watch:
            assert not watch.must_stop()
            os.kill(os.getpid(), number)
            assert watch.must_stop() and watch.signal == name
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_watch_leaves_sighup_ignored_as_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Watch() as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not watch.must_stop()
    finally:
        signal.signal(signal.SIGHUP, before)
