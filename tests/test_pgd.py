"""PGD against closed forms, NumPy and statistics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from aft_jax.adversarial import pgd
from aft_jax.adversarial.pgd import PGD, direction, project, random_in_ball
from aft_jax.models import logits_function
from aft_jax.models.mnist_cnn import MnistCNN

perturb = jax.jit(pgd.perturb, static_argnames=('logits', 'pgd'))
KEY = jax.random.key(3)
SHAPE = (6, 3, 4, 2)


def random_images(shape=SHAPE, low=0.0, high=1.0, seed=0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def linear(classes=2, seed=1, shape=SHAPE):
    """Weights [D, K] and the classifier images -> images @ weights."""
    weights = np.random.default_rng(seed).normal(0, 0.3, (np.prod(shape[1:]), classes)).astype(np.float32)
    return weights, lambda x: x.reshape((len(x), -1)) @ weights


def bumpy(x):
    """A smooth classifier with many local maxima of its loss, so that starts matter."""
    weights = np.random.default_rng(2).normal(0, 2.0, (np.prod(x.shape[1:]), 3)).astype(np.float32)
    return 2 * jnp.sin(2 * (x.reshape((len(x), -1)) @ weights))


def norms(delta, norm):
    delta = np.asarray(delta, np.float64).reshape(len(delta), -1)
    return np.abs(delta).max(axis=1) if norm == 'linf' else np.linalg.norm(delta, axis=1)


# The step and the ball: few short steps stay inside, many or long ones end on the border.
@pytest.mark.parametrize(('steps', 'step_size', 'travelled'), [(3, 0.02, 0.06), (8, 0.03, 0.1), (2, 0.5, 0.1)])
@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_perturb_has_a_closed_form_on_a_linear_classifier_of_two_classes(norm, steps, step_size, travelled):
    """Its gradient is a positive multiple of w_other - w_label everywhere, so PGD walks along a straight line."""
    weights, logits = linear()
    images = random_images(low=0.3, high=0.7)
    labels = np.array([0, 1, 0, 1, 1, 0], np.int32)
    uphill = (weights[:, 1 - labels] - weights[:, labels]).T.reshape(SHAPE).astype(np.float64)
    unit = np.sign(uphill) if norm == 'linf' else uphill / norms(uphill, 'l2')[:, None, None, None]
    expected = images + travelled * unit
    pgd = PGD(eps=0.1, step_size=step_size, steps=steps, norm=norm)
    np.testing.assert_allclose(perturb(logits, images, labels, KEY, pgd), expected, atol=1e-6)


def test_perturb_clips_to_the_range_of_images_if_asked():
    weights, logits = linear()
    images = random_images()
    labels = np.zeros(len(images), np.int32)
    moved = images + 0.3 * np.sign(weights[:, 1] - weights[:, 0]).reshape(1, *SHAPE[1:])
    pgd = PGD(eps=0.3, step_size=0.1, steps=5, norm='linf')
    np.testing.assert_allclose(perturb(logits, images, labels, KEY, pgd), np.clip(moved, 0, 1), atol=1e-6)
    assert moved.min() < 0 and moved.max() > 1
    np.testing.assert_allclose(perturb(logits, images, labels, KEY, pgd._replace(clip=False)), moved, atol=1e-6)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_project_equals_numpy(norm):
    delta = np.random.default_rng(4).normal(0, 0.2, SHAPE).astype(np.float32)
    delta[0] *= 0.01  # one well inside the ball
    delta[1] = 0.0
    eps = 0.3
    expected = delta.astype(np.float64)
    for i in range(len(delta)):
        if norm == 'linf':
            expected[i] = np.minimum(np.maximum(expected[i], -eps), eps)
        elif np.linalg.norm(expected[i]) > eps:
            expected[i] *= eps / np.linalg.norm(expected[i])
    actual = np.asarray(project(delta, eps, norm))
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    np.testing.assert_array_equal(actual[:2], delta[:2])
    assert not np.allclose(expected[2:], delta[2:])


def test_direction_is_a_unit_step_and_zero_without_a_gradient():
    gradient = np.random.default_rng(5).normal(0, 1e-4, SHAPE).astype(np.float32)
    gradient[2] = 0.0
    unit = np.asarray(direction(gradient, 'l2'))
    np.testing.assert_allclose(norms(unit, 'l2'), [1, 1, 0, 1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(unit[0], gradient[0] / np.linalg.norm(gradient[0]), atol=1e-6)
    np.testing.assert_array_equal(direction(gradient, 'linf'), np.sign(gradient))


def test_random_in_ball_is_uniform_in_the_linf_ball():
    delta = np.asarray(random_in_ball(KEY, (500, 2, 2, 1), 0.25, 'linf'))
    assert scipy.stats.kstest(delta.ravel(), scipy.stats.uniform(-0.25, 0.5).cdf).pvalue > 0.01
    assert np.abs(np.corrcoef(delta.reshape(500, 4).T) - np.eye(4)).max() < 0.15


def test_random_in_ball_is_uniform_in_the_l2_ball():
    """In d dimensions (radius / eps)^d is uniform, and the direction is uniform on the sphere."""
    delta = np.asarray(random_in_ball(KEY, (4000, 2, 2, 1), 0.25, 'l2'), np.float64).reshape(4000, 4)
    radius = np.linalg.norm(delta, axis=1)
    assert radius.max() <= 0.25 * (1 + 1e-6)
    assert scipy.stats.kstest((radius / 0.25) ** 4, 'uniform').pvalue > 0.01
    # One coordinate of a uniform direction in four dimensions: (x + 1) / 2 ~ Beta(3/2, 3/2).
    for coordinate in (delta / radius[:, None]).T:
        assert scipy.stats.kstest((coordinate + 1) / 2, scipy.stats.beta(1.5, 1.5).cdf).pvalue > 0.01


def test_perturb_starts_at_random_only_if_asked():
    images, labels = random_images(low=0.3, high=0.7), np.zeros(6, np.int32)
    still = PGD(eps=0.1, step_size=0.01, steps=0)
    np.testing.assert_array_equal(perturb(bumpy, images, labels, KEY, still), images)
    started = perturb(bumpy, images, labels, KEY, still._replace(random_start=True))
    assert (norms(started - images, 'linf') > 0.05).all()
    other = perturb(bumpy, images, labels, jax.random.key(4), still._replace(random_start=True))
    assert not np.allclose(started, other)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize(('random_start', 'clip'), [(False, True), (False, False), (True, True), (True, False)])
def test_perturb_keeps_budget_and_range(norm, random_start, clip):
    images, labels = random_images(), np.arange(6, dtype=np.int32) % 3
    pgd = PGD(0.2, 0.15, 3, norm, random_start, clip)
    examples = np.asarray(perturb(bumpy, images, labels, KEY, pgd))
    assert examples.dtype == np.float32 and examples.shape == SHAPE
    assert norms(examples.astype(np.float64) - images, norm).max() <= 0.2 + 1e-6
    assert norms(examples - images, norm).min() > 0
    if clip:
        assert examples.min() >= 0 and examples.max() <= 1


def test_perturb_leaves_the_label():
    _, logits = linear(classes=4)
    images = random_images(low=0.3, high=0.7)
    labels = np.asarray(logits(images)).argmax(axis=1).astype(np.int32)
    examples = perturb(logits, images, labels, KEY, PGD(eps=0.5, step_size=0.1, steps=10))
    assert (np.asarray(logits(examples)).argmax(axis=1) != labels).all()


def test_perturb_differentiates_images_only():
    weights, _ = linear()
    perturbed = []

    @jax.custom_vjp
    def dense(x, w):
        return x @ w

    def forward(x, w):
        perturbed.append((x.perturbed, w.perturbed))
        return x.value @ w.value, w.value

    def backward(w, cotangent):
        return cotangent @ w.T, None

    dense.defvjp(forward, backward, symbolic_zeros=True)
    images, labels = random_images(), np.zeros(6, np.int32)
    pgd = PGD(eps=0.1, step_size=0.02, steps=2)
    perturb(lambda x: dense(x.reshape((6, -1)), jnp.asarray(weights)), images, labels, KEY, pgd)
    assert perturbed == [(True, False)] * 2


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_perturb_of_a_batch_equals_its_images_one_by_one(norm):
    images, labels = random_images(), np.arange(6, dtype=np.int32) % 3
    pgd = PGD(eps=0.2, step_size=0.04, steps=4, norm=norm)
    together = perturb(bumpy, images, labels, KEY, pgd)
    alone = [perturb(bumpy, images[i : i + 1], labels[i : i + 1], KEY, pgd) for i in range(6)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)


def test_perturb_loops_unless_gradients_are_slow_in_loops():
    images, labels = random_images(), np.arange(6, dtype=np.int32) % 3
    options = PGD(eps=0.2, step_size=0.04, steps=4, random_start=True)

    class Fast:
        slow_in_loops = False

        def __call__(self, images):
            return bumpy(images)

    looped, unrolled = (
        jax.jit(partial(pgd.perturb, logits, pgd=options)).trace(images, labels, KEY) for logits in (Fast(), bumpy)
    )
    assert 'scan[' in str(looped.jaxpr) and 'scan[' not in str(unrolled.jaxpr)
    loop, steps = (traced.lower().compile()(images, labels, KEY) for traced in (looped, unrolled))
    np.testing.assert_allclose(loop, steps, atol=1e-5)


def test_slow_in_loops_depends_on_backend_and_network(monkeypatch, tiny_net, tiny_variables):
    own, foreign = logits_function(MnistCNN(num_classes=4), {}), logits_function(tiny_net, tiny_variables)
    assert pgd.slow_in_loops(bumpy) and pgd.slow_in_loops(own) and pgd.slow_in_loops(foreign)  # on several CPU devices
    monkeypatch.setattr(pgd.jax, 'device_count', lambda: 1)
    assert not pgd.slow_in_loops(logits_function(MnistCNN(num_classes=4), {}))
    assert pgd.slow_in_loops(logits_function(tiny_net, tiny_variables))
    monkeypatch.setattr(pgd.jax, 'default_backend', lambda: 'gpu')
    assert not pgd.slow_in_loops(bumpy) and not pgd.slow_in_loops(logits_function(tiny_net, tiny_variables))
