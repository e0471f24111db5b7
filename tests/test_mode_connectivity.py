"""MCR: curve, step and statistics against NumPy, and what a whole run trains on, chooses and leaves alone."""

import time
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import scipy.special

from aft_jax.defenses import DEFENSES, DefenderData, defender, mcr
from aft_jax.defenses.batch_norm_statistics import Statistics
from aft_jax.errors import UserError
from aft_jax.runtime.sharding import make_mesh
from aft_jax.training import state
from aft_jax.training.optimiser import sgd
from aft_jax.validation import validate

NOTHING = ml_collections.ConfigDict({'crop': 0, 'flip': False, 'rotation': 0.0})


class Linear(nn.Module):
    """Two classes, whose gradient can be written down."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dense(2)(images.reshape((len(images), -1)))


class TwoNorms(nn.Module):
    """Statistics over pixels, and over the images alone of what the first statistics made; dropout between them."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        # Momenta that no result may depend on.
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='pixels')(nn.Dense(3, name='paint')(images))
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x).max(axis=(1, 2)))
        return nn.BatchNorm(use_running_average=not train, momentum=0.5, name='images')(nn.Dense(4, name='mix')(x))


def weights(seed):
    generator = np.random.default_rng(seed)
    draw = partial(generator.normal, 0, 0.5)
    return {'Dense_0': {'kernel': draw(size=(16, 2)).astype(np.float32), 'bias': draw(size=2).astype(np.float32)}}


def between(start, bend, end, t):
    """The curve in float64, leaf by leaf."""
    return jax.tree.map(
        lambda a, b, c: (1 - t) ** 2 * a.astype(np.float64) + 2 * t * (1 - t) * b.astype(np.float64) + t**2 * c,
        start,
        bend,
        end,
    )


def assert_close(actual, expected, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=atol), actual, expected)


def as_numpy(tree):
    return jax.tree.map(np.array, tree)


@pytest.mark.parametrize('number', [float, jnp.float32])
def test_the_curve_goes_from_one_end_to_the_other(number):
    start, bend, end = (weights(seed) for seed in (1, 2, 3))
    assert_close(mcr.point(start, bend, end, number(0)), start, 0)
    assert_close(mcr.point(start, bend, end, number(1)), end, 0)
    inside = mcr.point(start, bend, end, number(0.3))
    assert_close(inside, between(start, bend, end, 0.3), 1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(inside)} == {np.dtype(np.float32)}


def test_a_step_moves_theta_by_its_share_of_the_slope_at_a_random_place():
    generator = np.random.default_rng(0)
    images = generator.uniform(0, 1, (8, 4, 4, 1)).astype(np.float32)
    labels = np.array([0, 1, 1, 0, 1, 0, 0, 1], np.int32)
    start, theta, end = (weights(seed) for seed in (1, 2, 3))
    optimiser = sgd(0.5, 'constant', 1, weight_decay=0.0)
    step = jax.jit(partial(mcr.mcr_step, module=Linear(), optimiser=optimiser, augmentation=NOTHING))
    batch = {'images': jnp.asarray(images), 'labels': jnp.asarray(labels), 'constants': (start, end)}
    before = state.create({'params': jax.tree.map(jnp.asarray, theta)}, optimiser)
    places = []
    for seed in range(20):
        after, metrics = step(before, batch, jax.random.key(seed))
        t = float(metrics['t'])
        places.append(t)
        flat = images.reshape(8, 16).astype(np.float64)
        dense = between(start, theta, end, t)['Dense_0']
        z = flat @ dense['kernel'] + dense['bias']
        error = (scipy.special.softmax(z, axis=1) - np.eye(2)[labels]) / 8
        share = 2 * t * (1 - t)
        slope = {'Dense_0': {'kernel': share * flat.T @ error, 'bias': share * error.sum(axis=0)}}
        assert_close(after.params, jax.tree.map(lambda w, g: w - 0.5 * g, theta, slope), 1e-5)
        entropy = -scipy.special.log_softmax(z, axis=1)[np.arange(8), labels].mean()
        np.testing.assert_allclose(metrics['loss'], entropy, atol=1e-5)
        np.testing.assert_allclose(metrics['accuracy'], np.mean(z.argmax(axis=1) == labels), atol=1e-6)
    assert 0 <= min(places) < 0.25 and 0.75 < max(places) <= 1


def test_statistics_equal_numpy():
    """22 images in batches of 8: two full ones, and one of 6 and padding, which must not be seen."""
    images = np.random.default_rng(0).integers(0, 256, (22, 4, 4, 2), np.uint8)
    variables = as_numpy(TwoNorms().init(jax.random.key(0), np.zeros((1, 4, 4, 2), np.float32)))
    generator = np.random.default_rng(1)
    variables = jax.tree.map(lambda x: generator.uniform(0.5, 2, x.shape).astype(np.float32), variables)
    params = jax.tree.map(np.float64, variables['params'])
    pixels, mixed = [], []
    for first in (0, 8, 16):
        x = images[first : first + 8] / 255 @ params['paint']['kernel'] + params['paint']['bias']
        pixels.append(x)
        x = (x - x.mean(axis=(0, 1, 2))) / np.sqrt(x.var(axis=(0, 1, 2)) + 1e-5)
        x = np.maximum(x * params['pixels']['scale'] + params['pixels']['bias'], 0).max(axis=(1, 2))
        mixed.append(x @ params['mix']['kernel'] + params['mix']['bias'])
    pixels, mixed = np.concatenate(pixels), np.concatenate(mixed)
    expected = {
        'pixels': {'mean': pixels.mean(axis=(0, 1, 2)), 'var': pixels.var(axis=(0, 1, 2))},
        'images': {'mean': mixed.mean(axis=0), 'var': mixed.var(axis=0)},
    }

    found = Statistics(TwoNorms(), make_mesh(), 8)(variables, images)
    assert_close(found['batch_stats'], expected, 1e-4)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    assert_close(found['params'], variables['params'], 0)


@pytest.fixture
def held_data(dataset, tiny_net, tiny_variables):
    """32 clean images and a fresh network as the suspect model."""
    return DefenderData(tiny_net, tiny_variables, dataset.train_images[:32], dataset.train_labels[:32])


@pytest.fixture
def purify(make_run, config, monkeypatch):
    """Returns a function that runs MCR; returns what it returns, and what each stage left."""
    config.mcr.update({'endpoint_epochs': 1, 'epochs': 2, 'candidates': (0.7, 0.2, 0.5), 'learning_rate': 0.1})
    left = {}

    def remember(function):
        def call(run, stage, *arguments, **options):
            left[stage] = function(run, stage, *arguments, **options)
            return left[stage]

        return call

    monkeypatch.setattr(mcr, 'fit', remember(mcr.fit))
    monkeypatch.setattr(mcr, 'fine_tune', remember(mcr.fine_tune))

    def call(held_data, name='run', **tuning):
        config.tuning.update(tuning)
        left.clear()
        fitted = DEFENSES['mcr'](make_run(name), 'purify/mcr', held_data, config)
        return fitted, dict(left)

    return call


def test_a_run_resumes_and_trains_on_nothing_that_is_held_out(purify, held_data, monkeypatch, assert_trees_close):
    suspect = as_numpy(held_data.variables)
    started = time.monotonic()
    fitted, left = purify(held_data, budget=1.0)
    took = time.monotonic() - started
    assert list(left) == ['purify/mcr/endpoint', 'purify/mcr/curve']
    endpoint, curve = (as_numpy(part.state) for part in left.values())
    # 26 images in batches of 8.
    assert (int(endpoint.step), int(curve.step)) == (3, 6)
    assert_trees_close(as_numpy(held_data.variables), suspect)
    assert_close(fitted.state.params, between(suspect['params'], curve.params, endpoint.params, 0.7), 1e-6)
    middle = jax.tree.map(lambda a, b: (a + b) / 2, suspect['params'], endpoint.params)
    assert not np.allclose(curve.params['Dense_0']['kernel'], middle['Dense_0']['kernel'], atol=1e-3)
    assert sum(part.seconds for part in left.values()) < fitted.seconds < took

    # The statistics are those of the images that are not held out, as the chosen parameters see them.
    kept, held = defender.hold_out(held_data, 0.2, seed=0)
    dense = as_numpy(fitted.state.params['Dense_0'])
    inputs = (kept.images.reshape(len(kept.images), -1) / 255 - 0.5) @ dense['kernel'] + dense['bias']
    expected = {'mean': inputs.mean(axis=0), 'var': inputs.var(axis=0)}
    assert_close(fitted.state.batch_stats['BatchNorm_0'], expected, 1e-5)

    # Again in the same directory: everything is loaded, and its time counted.
    def never(*_, **__):
        raise AssertionError('a step was taken')

    with monkeypatch.context() as patch:
        patch.setattr(mcr, 'mcr_step', never)
        again, _ = purify(held_data, budget=1.0)
    assert_trees_close(as_numpy(again.state), as_numpy(fitted.state))
    assert again.seconds > sum(part.seconds for part in left.values())

    # Elsewhere, with held-out images that show nothing: the same model.
    training = {image.tobytes() for image in kept.images}
    black = np.array([image if image.tobytes() in training else 0 * image for image in held_data.images])
    assert np.sum(~black.any(axis=(1, 2, 3))) == len(held.labels) > 0
    other, _ = purify(held_data._replace(images=black), 'other', budget=1.0)
    assert_trees_close(as_numpy(other.state.variables), as_numpy(fitted.state.variables))


@pytest.mark.parametrize(('accuracies', 'chosen'), [((0.89, 0.885, 0.7), 0.5), ((0.7, 0.6, 0.5), 0.2)])
def test_the_strongest_place_within_the_budget_is_taken(accuracies, chosen, monkeypatch, purify, held_data):
    measured = []

    def accuracy(run, held, variables):
        np.testing.assert_array_equal(held.labels, defender.hold_out(held_data, 0.2, seed=0)[1].labels)
        measured.append(variables)
        return accuracies[len(measured) - 1]

    monkeypatch.setattr(mcr.defender, 'accuracy', accuracy)
    fitted, left = purify(held_data, budget=0.02)
    endpoint, curve = (as_numpy(part.state.params) for part in left.values())
    assert len(measured) == 3
    for variables, t in zip(measured, (0.2, 0.5, 0.7), strict=True):
        expected = between(as_numpy(held_data.variables['params']), curve, endpoint, t)
        assert_close(variables['params'], expected, 1e-6)
        if t == chosen:
            assert_close(fitted.state.params, expected, 1e-6)


@pytest.mark.parametrize(
    ('field', 'value', 'sentence'),
    [
        ('candidates', (0.0, 0.5), r'mcr.candidates=\(0.0, 0.5\) must lie strictly between 0 and 1'),
        ('candidates', (0.5, 1.0), 'must lie strictly between 0 and 1'),
        ('candidates', (), 'one or more'),
        ('candidates', ('middle',), 'mcr.candidates=.* should be'),
        ('epochs', 0, 'mcr.epochs=0 must be positive'),
        ('endpoint_epochs', 0, 'mcr.endpoint_epochs=0 must be positive'),
        ('learning_rate', 0.0, 'mcr.learning_rate=0.0 must be positive'),
        ('schedule', 'linear', "mcr.schedule='linear' does not exist"),
    ],
)
def test_wrong_values_are_named(config, field, value, sentence):
    config.mcr[field] = value
    with pytest.raises(UserError, match=sentence):
        validate(config)
