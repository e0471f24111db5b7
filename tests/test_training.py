"""The optimiser against NumPy; devices, steps per call, interruptions and damage that must not change a result."""

import gc
import logging
import shutil
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Interrupted, lines, wander

from aft_jax import models
from aft_jax.errors import UserError
from aft_jax.models.classifier import Classifier
from aft_jax.models.layers import batch_norm, conv
from aft_jax.runtime.sharding import check_batch_size, make_mesh, replicate
from aft_jax.training import calls, state
from aft_jax.training.checkpoint import Checkpoints, checksum
from aft_jax.training.loop import fit
from aft_jax.training.optimiser import SCHEDULES, one_cycle, sgd
from aft_jax.training.stage import EvalHook, Phase, TrainingStage
from aft_jax.training.steps import accuracy, classification_step, cross_entropy

STEPS = 8


class SmallCNN(Classifier):
    """The layers of our networks, small enough to compile quickly."""

    def blocks(self, x, train):
        x = conv(4, 3, 2, dtype=self.dtype, use_bias=True)(x)
        return (nn.relu(batch_norm(x, train=train, dtype=self.dtype)),)

    def head(self, x, train):
        x = nn.Dropout(0.3, deterministic=not train)(x.reshape((len(x), -1)))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x)


def add_noise(key, images, labels):
    """A transform whose result depends on the key."""
    return images + 0.05 * jax.random.normal(key, images.shape), labels


@pytest.fixture
def train(dataset, tiny_net, tiny_variables):
    """A function that fits the tiny network, with any argument of `TrainingStage` replaced."""

    def call(run, module=tiny_net, variables=tiny_variables, step=None, steps=STEPS, stage='infect', **options):
        optimiser = sgd(0.05, 'cosine', steps, momentum=0.9, weight_decay=5e-4)
        step = step or partial(classification_step, module=module, optimiser=optimiser, transform=add_noise)
        arrays = {'images': dataset.train_images, 'labels': dataset.train_labels}
        options = {'phases': [Phase(step, steps)], 'arrays': arrays, 'batch_size': 8} | options
        return fit(run, TrainingStage(stage, state.create(variables, optimiser), **options))

    return call


def hook_that_fails_at(step, every_steps):
    def evaluate(point):
        assert int(point.state.step) == point.step
        if point.step == step:
            raise Interrupted
        return {'probed': float(point.step)}

    return EvalHook(evaluate, every_steps=every_steps)


def rate_of(schedule, peak, step, steps):
    """Computes the learning rate of a step."""
    rising = round(0.3 * steps) if schedule == 'one_cycle' else 0
    if schedule == 'constant':
        return peak
    if step < rising:
        return peak * (0.1 + 0.9 * step / rising)
    return peak * (1 + np.cos(np.pi * (step - rising) / (steps - rising))) / 2


@pytest.mark.parametrize('steps', [1, 2, 3, 10, 25])
def test_one_cycle_rises_and_falls(steps):
    rates = [float(one_cycle(0.2, steps)(jnp.float32(step))) for step in range(steps)]
    np.testing.assert_allclose(rates, [rate_of('one_cycle', 0.2, step, steps) for step in range(steps)], atol=1e-6)


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('max_grad_norm', [0.0, 1.0])
def test_sgd_equals_torch_in_numpy(schedule, max_grad_norm):
    """buffer = momentum * buffer + (gradient + decay * p); p -= rate(t) * buffer, on a quadratic bowl."""
    generator = np.random.default_rng(0)
    curvature, start = generator.uniform(0.5, 2, (3, 4)), generator.normal(size=(3, 4))
    steps, rate, momentum, decay = 12, 0.1, 0.8, 0.05
    optimiser = sgd(rate, schedule, steps, momentum=momentum, weight_decay=decay, max_grad_norm=max_grad_norm)
    params = {'w': jnp.asarray(start, jnp.float32)}
    carried = optimiser.init(params)
    update = jax.jit(optimiser.update)
    expected, buffer, clipped = start.copy(), np.zeros_like(start), 0
    for t in range(steps):
        gradient = curvature * expected
        length = np.linalg.norm(gradient)
        if max_grad_norm and length > max_grad_norm:
            gradient, clipped = gradient * max_grad_norm / length, clipped + 1
        buffer = momentum * buffer + gradient + decay * expected
        expected = expected - rate_of(schedule, rate, t, steps) * buffer
        updates, carried = update({'w': jnp.asarray(curvature, jnp.float32) * params['w']}, carried, params)
        params = jax.tree.map(jnp.add, params, updates)
        np.testing.assert_allclose(params['w'], expected, atol=1e-5)
    assert clipped > 0 if max_grad_norm else clipped == 0


def test_cross_entropy_and_accuracy_by_hand():
    logits = jnp.asarray([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0], [1.0, 0.0, 0.0]])
    labels = jnp.asarray([0, 2, 1])
    e = np.exp
    expected = -np.mean([np.log(e(2) / (e(2) + e(1) + 1)), np.log(e(3) / (e(3) + 2)), np.log(1 / (e(1) + 2))])
    np.testing.assert_allclose(cross_entropy(logits, labels), expected, atol=1e-6)
    np.testing.assert_allclose(accuracy(logits, labels), 2 / 3, atol=1e-6)


def test_fit_on_four_devices_equals_one(train, make_run, assert_trees_close):
    """Parameters, momentum, batch statistics and metrics of three steps agree."""
    module = SmallCNN(4)
    variables = models.initialise(module, jax.random.key(0), (8, 8, 1))
    runs = [make_run(f'{count}', devices=count) for count in (1, 4)]
    one, four = (train(run, module, variables, steps=3).state for run in runs)
    assert len(four.step.sharding.device_set) == 4 and len(one.step.sharding.device_set) == 1
    assert_trees_close(four, one, atol=1e-5)
    assert not np.allclose(one.batch_stats['BatchNorm_0']['mean'], 0)
    for a, b in zip(*map(lines, runs), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_fit_with_several_steps_per_call_equals_one(train, make_run, assert_trees_close):
    """Calls have two steps, or one where something is logged (3), saved (5), or ends (11) in between."""
    every = {'log_every': 3, 'checkpoint_every': 5}
    runs = [make_run(f'{chunk}', steps_per_call=chunk, **every) for chunk in (1, 2)]
    one, two = (train(run, step=wander, steps=11).state for run in runs)
    assert_trees_close(two, one, atol=1e-6)
    assert [line['step'] for line in lines(runs[0])] == [3, 5, 6, 9, 10, 11]
    for a, b in zip(*map(lines, runs), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_plan_calls_ends_a_call_at_every_mark():
    planned = list(calls.plan_calls(0, [23, 31], [10, 14], 4))
    assert [last for _, last in planned] == [4, 8, 9, 10, 14, 18, 19, 20, 21, 22, 23, 27, 28, 29, 30, 31]
    assert [first for first, _ in planned] == [0, *(last for _, last in planned[:-1])]


@pytest.mark.parametrize('call', [0, 3, 7, 12])
def test_plan_calls_of_a_resumed_run_are_the_same(call):
    planned = list(calls.plan_calls(0, [23, 31], [10, 14], 4))
    assert list(calls.plan_calls(planned[call][0], [23, 31], [10, 14], 4)) == planned[call:]


@pytest.mark.parametrize(
    ('backend', 'setting', 'on_cpu', 'ends', 'intervals', 'expected'),
    [
        ('cpu', 0, 5, [9380], [50, 1000], 5),
        ('cpu', 0, 5, [891, 938], [50, 500], 1),
        ('cpu', 0, 5, [938], [50, 500], 2),
        ('cpu', 0, 1, [9380], [50], 1),
        ('cpu', 7, 1, [9380], [50], 7),
        ('gpu', 0, 1, [9380], [50, 1000], 50),
        ('gpu', 0, 1, [9380], [20, 1000], 20),
        # 47, 3, 44, 6, ...: in calls of 47 nearly every step would be a call.
        ('gpu', 0, 1, [940], [50, 47], 7),
        ('gpu', 9, 1, [9380], [20, 1000], 9),
    ],
)
def test_steps_per_call(make_run, monkeypatch, backend, setting, on_cpu, ends, intervals, expected):
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    assert calls.steps_per_call(make_run(steps_per_call=setting).options, on_cpu, ends, intervals) == expected


def test_fit_logs_averages_since_the_last_line(train, make_run):
    run = make_run(log_every=3)
    train(run, step=wander)  # the loss is the number of the step: 0, 1, 2, ...
    assert [(line['step'], line['loss']) for line in lines(run)] == [(3, 1.0), (6, 4.0), (8, 6.5)]


def record(current, batch, key):
    """A step that learns nothing and reports its arguments."""
    places = jnp.asarray([1.0, 10.0, 100.0, 1000.0])
    metrics = {
        'loss': jnp.zeros(()),
        'labels': jnp.sum(batch['labels'].astype(jnp.float32) * places),
        'images': jnp.sum(batch['images'][:, 0, 0, 0] * 255 * places),
        'extra': jnp.sum(batch['extra'] * places),
        'second': jnp.sum(batch['second']['labels'].astype(jnp.float32) * places),
        'constants': batch['constants']['w'][0],
        'key': jax.random.uniform(key),
    }
    return current.replace(step=current.step + 1), metrics


def digits(values):
    """Unpacks the four indices below 10 that `record` packed into each number."""
    return np.array([[round(v) // 10**i % 10 for i in range(4)] for v in values])


def test_fit_passes_batches_constants_and_keys_to_a_step(make_run, tiny_variables):
    arrays = {
        'images': np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1),
        'labels': np.arange(10, dtype=np.int32),
        'extra': np.arange(10, dtype=np.float32),
    }
    start = state.create(tiny_variables, sgd(0.1, 'constant', 1, momentum=0.9, weight_decay=5e-4))
    constants = {'w': np.full(3, 7.5, np.float32)}
    run = make_run()
    fit(run, TrainingStage('x', start, [Phase(record, 10)], arrays, 4, constants, num_streams=2))
    columns = {name: [line[name] for line in lines(run)] for name in lines(run)[0]}
    rows = digits(columns['labels'])
    for name in ('images', 'extra'):
        np.testing.assert_array_equal(digits(columns[name]), rows)
    for stream in (rows, digits(columns['second'])):
        np.testing.assert_array_equal(np.sort(stream.reshape(4, 10), axis=1), np.tile(np.arange(10), (4, 1)))
    assert (rows != digits(columns['second'])).mean() > 0.5
    assert columns['constants'] == [7.5] * 10
    assert len(set(columns['key'])) == 10
    other = make_run('other')
    fit(other, TrainingStage('y', start, [Phase(record, 10)], arrays, 4, constants, num_streams=2))
    assert not set(columns['key']) & {line['key'] for line in lines(other)}


def test_fit_phases_may_report_different_metrics(make_run, tiny_variables, dataset):
    def first(current, batch, key):
        return current.replace(step=current.step + 1), {'loss': jnp.ones(()), 'early': jnp.full((), 5.0)}

    def second(current, batch, key):
        return current.replace(step=current.step + 1), {'loss': jnp.zeros(()), 'late': jnp.full((), 7.0)}

    run = make_run(log_every=4)
    start = state.create(tiny_variables, sgd(0.1, 'constant', 1, momentum=0.9, weight_decay=5e-4))
    arrays = {'images': dataset.train_images, 'labels': dataset.train_labels}
    fit(run, TrainingStage('x', start, [Phase(first, 3), Phase(second, 8)], arrays, 8))
    assert [{k: v for k, v in line.items() if k != 'stage'} for line in lines(run)] == [
        {'step': 4, 'loss': 0.75, 'early': 5.0, 'late': 7.0},
        {'step': 8, 'loss': 0.0, 'late': 7.0},
    ]


@pytest.mark.parametrize('every', [2, 3])
def test_fit_resumed_equals_uninterrupted_bit_for_bit(train, make_run, assert_trees_close, every):
    step = wander if every == 3 else None  # the real step once is enough
    whole, cut = make_run('whole', checkpoint_every=every), make_run('cut', checkpoint_every=every)
    expected = train(whole, step=step, eval_hooks=(hook_that_fails_at(-1, every_steps=1),))
    with pytest.raises(Interrupted):
        train(cut, step=step, eval_hooks=(hook_that_fails_at(5, every_steps=1),))
    last = lines(cut)[-1]
    assert last['step'] == 5  # beyond the checkpoint: this line will be written again
    with (cut.workdir / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 6, "sta')  # and this one was cut short
    taken = []

    def evaluate(point):
        taken.append(int(point.state.step))
        return {'probed': float(point.step)}

    resumed = train(cut, step=step, eval_hooks=(EvalHook(evaluate, every_steps=1),))
    assert taken == list(range(5 // every * every + 1, STEPS + 1))  # from the checkpoint, not from the start
    assert_trees_close(resumed.state, expected.state)
    assert lines(cut) == lines(whole)


def test_fit_resuming_one_stage_keeps_the_lines_of_another(train, make_run):
    run = make_run(checkpoint_every=2)
    train(run, step=wander, stage='infect')
    first = lines(run)
    with pytest.raises(Interrupted):
        train(run, step=wander, stage='purify/ft', eval_hooks=(hook_that_fails_at(3, every_steps=1),))
    train(run, step=wander, stage='purify/ft')
    assert lines(run)[: len(first)] == first
    purified = [line['step'] for line in lines(run)[len(first) :] if 'loss' in line]
    assert purified == list(range(1, STEPS + 1))


def test_fit_loads_a_finished_stage_and_does_not_change_its_arguments(
    train, make_run, assert_trees_close, tiny_variables
):
    run = make_run()
    variables_before = jax.tree.map(np.array, tiny_variables)
    expected = train(run)
    assert_trees_close(tiny_variables, variables_before)
    before = lines(run)

    def never(*_):
        raise AssertionError('a finished stage took a step')

    again = train(run, step=never)
    assert_trees_close(again.state, expected.state)
    assert again.seconds == expected.seconds > 0
    assert lines(run) == before


@pytest.mark.parametrize('log_every', [1, 50])
def test_fit_stops_at_a_non_finite_loss_and_keeps_the_checkpoint(
    train, make_run, assert_trees_close, tiny_variables, log_every
):
    whole, broken = (make_run(name, checkpoint_every=2, log_every=log_every) for name in ('whole', 'broken'))

    def diverging(current, batch, key):
        poison = jnp.where(current.step >= 4, jnp.nan, 0.0)  # from the fifth step on
        after, metrics = wander(current, batch, key)
        after = after.replace(params=jax.tree.map(lambda p: p + poison, after.params))
        return after, metrics | {'kick': metrics['kick'] + poison, 'loss': metrics['loss'] + poison}

    with pytest.raises(UserError, match=r'^infect stopped before step [56]: loss .*learning rate'):
        train(broken, step=diverging)
    assert all(np.isfinite([line[name] for name in line if name != 'stage']).all() for line in lines(broken))
    start = replicate(
        broken.mesh, state.create(tiny_variables, sgd(0.05, 'cosine', STEPS, momentum=0.9, weight_decay=5e-4))
    )
    with Checkpoints(broken.workdir / 'checkpoints' / 'infect', keep=2) as checkpoints:
        saved, _ = checkpoints.restore(start)
    assert int(saved.step) == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved))
    assert_trees_close(train(broken, step=wander).state, train(whole, step=wander).state)


# Checkpoints on their own, of a state that costs nothing.


def small_state(step):
    generator = np.random.default_rng(step)
    tree = {
        'step': np.int32(step),
        'params': {'w': generator.normal(size=(40, 30)).astype(np.float32), 'b': np.zeros(3, np.float32)},
        'nothing': {},
    }
    return replicate(make_mesh(), jax.tree.map(jnp.asarray, tree))


def edit_info(checkpoint, name):
    (path,) = (path for path in (checkpoint / 'info').rglob('*') if path.is_file() and name in path.read_text())
    path.write_text(path.read_text().replace(name, 'other'))


@pytest.fixture(scope='module')
def saved_twice(tmp_path_factory):
    """A directory with the checkpoints of steps 2 and 4; copy it before damaging it."""
    directory = tmp_path_factory.mktemp('saved') / 'stage'
    with Checkpoints(directory, keep=2) as checkpoints:
        for step in (1, 2, 4):
            checkpoints.save(step, small_state(step), {'seconds': float(step)})
    assert sorted(path.name for path in directory.iterdir() if path.name.isdigit()) == ['2', '4']  # keep=2
    return directory


def restore(directory):
    with Checkpoints(directory, keep=2) as checkpoints:
        return checkpoints.restore(small_state(0))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def delete(path):
    path.unlink()


def files_of(directory):
    return [path for path in sorted(directory.rglob('*')) if path.is_file() and path.stat().st_size]


def damage_all(how):
    return lambda newest: [how(path) for path in files_of(newest)]


def damage_largest(how):
    return lambda newest: how(max(files_of(newest / 'state'), key=lambda path: path.stat().st_size))


def flip_all_bytes_of_arrays(newest):
    for path in files_of(newest / 'state'):
        path.write_bytes(bytes(b ^ 0xFF for b in path.read_bytes()))


def test_restore_loads_the_newest_checkpoint_and_its_info(saved_twice, assert_trees_close, caplog):
    restored, info = restore(saved_twice)
    assert_trees_close(restored, small_state(4))
    assert info['seconds'] == 4.0
    assert not caplog.records


def test_restore_without_checkpoints_is_none(tmp_path):
    assert restore(tmp_path / 'empty') is None


@pytest.mark.parametrize(
    'damage',
    {
        'every file cut in half': damage_all(truncate),
        'largest file cut in half': damage_largest(truncate),
        'a byte of the largest file': damage_largest(flip),
        'largest file deleted': damage_largest(delete),
        'every byte of the arrays': flip_all_bytes_of_arrays,
        'every file deleted': damage_all(delete),
        'arrays deleted': lambda newest: shutil.rmtree(newest / 'state'),
        'info deleted': lambda newest: shutil.rmtree(newest / 'info'),
        'info without seconds': lambda newest: edit_info(newest, 'seconds'),
        'emptied': lambda newest: [
            shutil.rmtree(path) if path.is_dir() else path.unlink() for path in newest.iterdir()
        ],
    }.items(),
    ids=lambda item: item[0],
)
def test_restore_skips_a_damaged_checkpoint(saved_twice, tmp_path, caplog, assert_trees_close, damage):
    directory = tmp_path / 'stage'
    shutil.copytree(saved_twice, directory)
    damage[1](directory / '4')
    with caplog.at_level(logging.WARNING), Checkpoints(directory, keep=2) as checkpoints:
        restored, info = checkpoints.restore(small_state(0))
        assert_trees_close(restored, small_state(2))
        assert info['seconds'] == 2.0
        warnings = [r for r in caplog.records if r.name.startswith('aft_jax')]
        assert [r.levelname for r in warnings] == ['WARNING'] and str(directory / '4') in warnings[0].getMessage()
        checkpoints.save(4, small_state(4), {'seconds': 5.0})  # its place is free again
    assert_trees_close(restore(directory)[0], small_state(4))
    assert (tmp_path / 'stage.damaged' / '4-0').is_dir()


def test_restore_with_all_checkpoints_damaged_is_none(saved_twice, tmp_path, caplog):
    directory = tmp_path / 'stage'
    shutil.copytree(saved_twice, directory)
    for step in ('2', '4'):
        damage_largest(truncate)(directory / step)
    assert restore(directory) is None
    assert len([r for r in caplog.records if 'is damaged' in r.getMessage()]) == 2


def test_restore_with_any_damaged_file_never_gives_wrong_values(saved_twice, tmp_path, caplog, assert_trees_close):
    """A flipped byte in a file has no effect, or it is reported and the checkpoint before is used."""
    skipped = 0
    for i, original in enumerate(files_of(saved_twice / '4')):
        directory = tmp_path / f'{i}'
        shutil.copytree(saved_twice, directory)
        flip(directory / original.relative_to(saved_twice))
        caplog.clear()
        restored, info = restore(directory)
        warned = any('is damaged' in record.getMessage() for record in caplog.records)
        assert_trees_close(restored, small_state(2 if warned else 4))
        assert info['seconds'] == (2.0 if warned else 4.0)
        skipped += warned
    assert skipped > 0


def test_restore_prints_no_tracebacks(saved_twice, tmp_path, capfd, caplog):
    """Reads that Orbax abandons after an error stay silent."""
    directory = tmp_path / 'stage'
    shutil.copytree(saved_twice, directory)
    damage_all(truncate)(directory / '4' / 'state' / 'd')
    assert restore(directory)[1]['seconds'] == 2.0
    gc.collect()
    assert 'Traceback' not in capfd.readouterr().err + caplog.text


def test_restore_ignores_a_half_written_directory(saved_twice, tmp_path, assert_trees_close):
    directory = tmp_path / 'stage'
    shutil.copytree(saved_twice, directory)
    half = directory / '6.orbax-checkpoint-tmp-1234567'
    shutil.copytree(directory / '4', half)
    damage_all(truncate)(half)
    with Checkpoints(directory, keep=2) as checkpoints:
        restored, _ = checkpoints.restore(small_state(0))
        assert_trees_close(restored, small_state(4))
        checkpoints.save(6, small_state(6), {'seconds': 6.0})
    assert_trees_close(restore(directory)[0], small_state(6))


def test_fit_resumes_before_a_damaged_checkpoint(train, make_run, caplog, assert_trees_close):
    whole, cut = (make_run(name, checkpoint_every=2) for name in ('whole', 'cut'))
    expected = train(whole, step=wander)
    with pytest.raises(Interrupted):
        train(cut, step=wander, eval_hooks=(hook_that_fails_at(5, every_steps=5),))
    checkpoints = cut.workdir / 'checkpoints' / 'infect'
    damage_all(truncate)(checkpoints / '4')
    shutil.copytree(checkpoints / '4', checkpoints / '5.orbax-checkpoint-tmp-1')
    assert_trees_close(train(cut, step=wander).state, expected.state)
    assert any('is damaged' in record.getMessage() for record in caplog.records)
    assert lines(cut) == lines(whole)


def test_checksum_sees_values_shapes_dtypes_and_names():
    base = {'a': np.arange(6, dtype=np.float32), 'b': np.float32(1)}
    others = [
        base | {'a': np.arange(6, dtype=np.float32)[::-1]},
        base | {'a': np.arange(6, dtype=np.float32).reshape(2, 3)},
        base | {'a': np.arange(6, dtype=np.float32).view(np.int32)},
        {'a': base['a'], 'c': base['b']},
        base | {'b': np.float32(np.nextafter(np.float32(1), np.float32(2)))},
    ]
    assert len({checksum(tree) for tree in [base, *others]}) == 6
    assert checksum(jax.tree.map(jnp.asarray, base)) == checksum(base)


@pytest.mark.parametrize(('size', 'advice'), [(10, '; 8 or 12 would work'), (2, '; 4 would work')])
def test_check_batch_size(train, make_run, size, advice):
    with pytest.raises(UserError, match=rf'^batch_size={size} cannot be divided among 4 devices.*{advice}'):
        train(make_run(), step=wander, batch_size=size)
    check_batch_size(make_mesh(), 8, 'batch_size')


def test_classification_step_in_mixed_precision(config, dataset, assert_trees_close):
    config.dtype = 'bfloat16'
    module = models.build(config, 4)
    optimiser = sgd(0.01, 'constant', 10, momentum=0.9, weight_decay=5e-4)
    before = state.create(models.initialise(module, jax.random.key(0), (8, 8, 1)), optimiser)
    batch = {
        'images': jnp.asarray(dataset.train_images[:8], jnp.float32) / 255,
        'labels': jnp.asarray(dataset.train_labels[:8]),
    }
    step = partial(classification_step, module=module, optimiser=optimiser, transform=add_noise)
    after, metrics = jax.jit(step)(before, batch, jax.random.key(1))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), before)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype('float32')}
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), after.params['Dense_1'], before.params['Dense_1'])
    assert all(jax.tree.leaves(changed))
    assert all(np.isfinite(value) and value.dtype == jnp.float32 for value in metrics.values())
