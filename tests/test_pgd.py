"""PGD against closed forms, NumPy and statistics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from aft_jax.adversarial import pgd
from aft_jax.adversarial.pgd import PGD, direction, project, random_in_ball

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


def losses(logits, images, labels):
    """NumPy cross-entropy [B]."""
    z = np.asarray(logits(images), np.float64)
    return np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), labels]


def norms(delta, norm):
    delta = np.asarray(delta, np.float64).reshape(len(delta), -1)
    return np.abs(delta).max(axis=1) if norm == 'linf' else np.linalg.norm(delta, axis=1)


# The step and the ball: few short steps stay inside, many or long ones end on the border.
@pytest.mark.parametrize(('steps', 'step_size', 'travelled'), [(3, 0.02, 0.06), (8, 0.03, 0.1), (2, 0.5, 0.1)])
@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize('targeted', [False, True])
def test_two_class_linear_classifier_has_a_closed_form(norm, steps, step_size, travelled, targeted):
    """Its gradient is a positive multiple of w_other - w_label everywhere, so PGD walks along a straight line."""
    weights, logits = linear()
    images = random_images(low=0.3, high=0.7)
    labels = np.array([0, 1, 0, 1, 1, 0], np.int32)
    uphill = (weights[:, 1 - labels] - weights[:, labels]).T.reshape(SHAPE).astype(np.float64)
    unit = np.sign(uphill) if norm == 'linf' else uphill / norms(uphill, 'l2')[:, None, None, None]
    expected = images + travelled * unit * (-1 if targeted else 1)
    pgd = PGD(eps=0.1, step_size=step_size, steps=steps, norm=norm, targeted=targeted)
    np.testing.assert_allclose(perturb(logits, images, labels, KEY, pgd), expected, atol=1e-6)


def test_clip_keeps_images_in_range_and_its_absence_does_not():
    weights, logits = linear()
    images = random_images()
    labels = np.zeros(len(images), np.int32)
    moved = images + 0.3 * np.sign(weights[:, 1] - weights[:, 0]).reshape(1, *SHAPE[1:])
    pgd = PGD(eps=0.3, step_size=0.1, steps=5, norm='linf')
    np.testing.assert_allclose(perturb(logits, images, labels, KEY, pgd), np.clip(moved, 0, 1), atol=1e-6)
    assert moved.min() < 0 and moved.max() > 1
    np.testing.assert_allclose(perturb(logits, images, labels, KEY, pgd._replace(clip=False)), moved, atol=1e-6)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_projection_equals_numpy(norm):
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


def test_random_start_is_uniform_in_the_linf_ball():
    delta = np.asarray(random_in_ball(KEY, (500, 2, 2, 1), 0.25, 'linf'))
    assert scipy.stats.kstest(delta.ravel(), scipy.stats.uniform(-0.25, 0.5).cdf).pvalue > 0.01
    assert np.abs(np.corrcoef(delta.reshape(500, 4).T) - np.eye(4)).max() < 0.15


def test_random_start_is_uniform_in_the_l2_ball():
    """In d dimensions (radius / eps)^d is uniform, and the direction is uniform on the sphere."""
    delta = np.asarray(random_in_ball(KEY, (4000, 2, 2, 1), 0.25, 'l2'), np.float64).reshape(4000, 4)
    radius = np.linalg.norm(delta, axis=1)
    assert radius.max() <= 0.25 * (1 + 1e-6)
    assert scipy.stats.kstest((radius / 0.25) ** 4, 'uniform').pvalue > 0.01
    # One coordinate of a uniform direction in four dimensions: (x + 1) / 2 ~ Beta(3/2, 3/2).
    for coordinate in (delta / radius[:, None]).T:
        assert scipy.stats.kstest((coordinate + 1) / 2, scipy.stats.beta(1.5, 1.5).cdf).pvalue > 0.01


def test_random_start_is_used_only_when_asked_for():
    images, labels = random_images(low=0.3, high=0.7), np.zeros(6, np.int32)
    still = PGD(eps=0.1, step_size=0.01, steps=0)
    np.testing.assert_array_equal(perturb(bumpy, images, labels, KEY, still), images)
    started = perturb(bumpy, images, labels, KEY, still._replace(random_start=True))
    assert (norms(started - images, 'linf') > 0.05).all()
    other = perturb(bumpy, images, labels, jax.random.key(4), still._replace(random_start=True))
    assert not np.allclose(started, other)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize(
    ('random_start', 'restarts', 'targeted', 'clip'),
    [(False, 1, False, True), (False, 1, True, False), (True, 1, True, True), (True, 2, False, False)],
)
def test_budget_and_range_always_hold(norm, random_start, restarts, targeted, clip):
    images, labels = random_images(), np.arange(6, dtype=np.int32) % 3
    pgd = PGD(0.2, 0.15, 3, norm, random_start, restarts, targeted, clip)
    examples = np.asarray(perturb(bumpy, images, labels, KEY, pgd))
    assert examples.dtype == np.float32 and examples.shape == SHAPE
    assert norms(examples.astype(np.float64) - images, norm).max() <= 0.2 + 1e-6
    assert norms(examples - images, norm).min() > 0
    if clip:
        assert examples.min() >= 0 and examples.max() <= 1


@pytest.mark.parametrize('targeted', [False, True])
def test_restarts_keep_the_best_run_of_each_image(targeted):
    images, labels = random_images(low=0.3, high=0.7), np.arange(6, dtype=np.int32) % 3
    pgd = PGD(eps=0.2, step_size=0.05, steps=3, random_start=True, targeted=targeted)
    runs = np.stack([perturb(bumpy, images, labels, key, pgd) for key in jax.random.split(KEY, 4)])
    run_losses = np.stack([losses(bumpy, run, labels) for run in runs])
    best = run_losses.argmin(axis=0) if targeted else run_losses.argmax(axis=0)
    assert len(set(best)) > 1  # else the choice would not be tested
    chosen = perturb(bumpy, images, labels, KEY, pgd._replace(restarts=4))
    np.testing.assert_allclose(chosen, runs[best, np.arange(6)], atol=1e-5)
    extreme = run_losses.min(axis=0) if targeted else run_losses.max(axis=0)
    np.testing.assert_allclose(losses(bumpy, chosen, labels), extreme, atol=1e-4)


def test_untargeted_leaves_the_label_and_targeted_reaches_it():
    _, logits = linear(classes=4)
    images = random_images(low=0.3, high=0.7)
    labels = np.asarray(logits(images)).argmax(axis=1).astype(np.int32)
    pgd = PGD(eps=0.5, step_size=0.1, steps=10, norm='linf')
    left = perturb(logits, images, labels, KEY, pgd)
    assert (np.asarray(logits(left)).argmax(axis=1) != labels).all()
    wanted = (labels + 2) % 4
    reached = perturb(logits, images, wanted, KEY, pgd._replace(targeted=True))
    np.testing.assert_array_equal(np.asarray(logits(reached)).argmax(axis=1), wanted)


def test_only_images_are_differentiated():
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
def test_a_batch_equals_its_images_one_by_one(norm):
    images, labels = random_images(), np.arange(6, dtype=np.int32) % 3
    pgd = PGD(eps=0.2, step_size=0.04, steps=4, norm=norm)
    together = perturb(bumpy, images, labels, KEY, pgd)
    alone = [perturb(bumpy, images[i : i + 1], labels[i : i + 1], KEY, pgd) for i in range(6)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)


def test_the_loop_of_accelerators_equals_the_unrolled_one(monkeypatch):
    images, labels = random_images(), np.arange(6, dtype=np.int32) % 3
    pgd = PGD(eps=0.2, step_size=0.04, steps=4, random_start=True, restarts=2)
    unrolled = perturb(bumpy, images, labels, KEY, pgd)
    monkeypatch.setattr(pgd.jax, 'default_backend', lambda: 'gpu')
    looped = jax.jit(partial(pgd.perturb, bumpy, pgd=pgd)).trace(images, labels, KEY)
    assert 'scan[' in str(looped.jaxpr) or 'while[' in str(looped.jaxpr)
    np.testing.assert_allclose(looped.lower().compile()(images, labels, KEY), unrolled, atol=1e-5)
