"""MCR: curve, step and statistics against NumPy, and what a whole run trains and chooses."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from defense_runs import as_numpy, run_twice

from aft_jax.data.augment import AugmentOptions
from aft_jax.defenses import DefenderData, defender, mcr
from aft_jax.defenses.batch_norm_statistics import Statistics
from aft_jax.errors import UserError
from aft_jax.runtime.sharding import make_mesh
from aft_jax.training import state
from aft_jax.training.optimiser import sgd
from aft_jax.validation import validate

NO_AUGMENTATION = AugmentOptions(crop=0, flip=False, rotation=0.0)


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


@pytest.mark.parametrize('number', [float, jnp.float32])
def test_point_goes_from_one_end_of_the_curve_to_the_other(number):
    start, bend, end = (weights(seed) for seed in (1, 2, 3))
    assert_close(mcr.point(start, bend, end, number(0)), start, 0)
    assert_close(mcr.point(start, bend, end, number(1)), end, 0)
    inside = mcr.point(start, bend, end, number(0.3))
    assert_close(inside, between(start, bend, end, 0.3), 1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(inside)} == {np.dtype(np.float32)}


def test_mcr_step_moves_theta_by_its_share_of_the_gradient_at_a_random_t():
    generator = np.random.default_rng(0)
    images = generator.uniform(0, 1, (8, 4, 4, 1)).astype(np.float32)
    labels = np.array([0, 1, 1, 0, 1, 0, 0, 1], np.int32)
    start, theta, end = (weights(seed) for seed in (1, 2, 3))
    optimiser = sgd(0.5, 'constant', 1, momentum=0.9, weight_decay=0.0)
    step = jax.jit(partial(mcr.mcr_step, module=Linear(), optimiser=optimiser, augmentation=NO_AUGMENTATION))
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


def test_statistics_equal_numpy_without_padding():
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

    measured = Statistics(TwoNorms(), make_mesh(), 8)(variables, images)
    assert_close(measured['batch_stats'], expected, 1e-4)
    assert {leaf.dtype for leaf in jax.tree.leaves(measured)} == {np.dtype(np.float32)}
    assert_close(measured['params'], variables['params'], 0)


@pytest.fixture
def held_data(dataset, tiny_net, tiny_variables):
    """32 clean images and a fresh network as the infected model."""
    return DefenderData(tiny_net, tiny_variables, dataset.train_images[:32], dataset.train_labels[:32])


@pytest.fixture
def mcr_config(config):
    config.mcr.update({'endpoint_epochs': 1, 'epochs': 2, 'candidates': (0.7, 0.2, 0.5), 'learning_rate': 0.1})
    return config


def test_purify_takes_the_last_point_of_the_curve_within_the_budget(mcr_config, make_run, held_data, monkeypatch):
    mcr_config.tuning.budget = 1.0
    purified, trained = run_twice('mcr', make_run(), held_data, mcr_config, monkeypatch)
    assert list(trained) == ['purify/mcr/endpoint', 'purify/mcr/curve']
    endpoint, curve = (as_numpy(fitted.state) for _, fitted in trained.values())
    assert (int(endpoint.step), int(curve.step)) == (3, 6)  # 26 images in batches of 8
    infected = held_data.variables['params']
    assert_close(purified.variables['params'], between(as_numpy(infected), curve.params, endpoint.params, 0.7), 1e-6)
    middle = jax.tree.map(lambda a, b: (a + b) / 2, infected, endpoint.params)
    assert not np.allclose(curve.params['Dense_0']['kernel'], middle['Dense_0']['kernel'], atol=1e-3)

    # The statistics are those of the images that are not held out, with the chosen parameters.
    kept, _ = defender.hold_out(held_data, 0.2, seed=0)
    dense = as_numpy(purified.variables['params']['Dense_0'])
    inputs = (kept.images.reshape(len(kept.images), -1) / 255 - 0.5) @ dense['kernel'] + dense['bias']
    expected = {'mean': inputs.mean(axis=0), 'var': inputs.var(axis=0)}
    assert_close(purified.variables['batch_stats']['BatchNorm_0'], expected, 1e-5)


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
def test_validate_names_wrong_values(config, field, value, sentence):
    config.mcr[field] = value
    with pytest.raises(UserError, match=sentence):
        validate(config)
