"""I-BAU: its hypergradient against a solved system and against differences, its search, and what a whole run trains."""

from functools import partial

import jax
import jax.numpy as jnp
import linear_numpy
import numpy as np
import optax
import pytest
from defense_runs import as_numpy, lines, run_twice
from linear_numpy import IMAGES, LABELS, flat, softmax
from toys import Linear

from aft_jax.defenses import DefenderData, i_bau
from aft_jax.errors import UserError
from aft_jax.training import state
from aft_jax.validation import validate

INNER_IMAGES, INNER_LABELS = IMAGES[::-1, ::-1].copy(), LABELS[::-1].copy()
# The penalty makes the inner problem convex, so that its fixed point exists.
OPTIONS = i_bau.IbauOptions(
    rounds=1,
    search_learning_rate=0.5,
    penalty=1.5,
    radius=0.0,
    perturbed_share=0.5,
    inner_learning_rate=0.3,
    fixed_point_steps=40,
    learning_rates=(0.1,),
)


def inner_slope(kernel, bias, d):
    """The gradient of L2 with respect to the perturbation, [16]."""
    p = softmax((flat(INNER_IMAGES) + d) @ kernel + bias)
    return -((p - np.eye(2)[INNER_LABELS]) @ kernel.T).mean(axis=0) + 2 * OPTIONS.penalty * d


def solve_inner(kernel, bias):
    d = np.zeros(16)
    for _ in range(300):
        d = d - 0.3 * inner_slope(kernel, bias, d)
    return d


def outer(kernel, bias, d):
    """L1 with the perturbation on the first four images, and its gradient with respect to the perturbation."""
    moved = flat(IMAGES) + d * (np.arange(8) < 4)[:, None]
    z = moved @ kernel + bias
    slope = ((softmax(z) - np.eye(2)[LABELS])[:4] @ kernel.T).sum(axis=0) / 8
    return linear_numpy.cross_entropy(z, LABELS), slope


@pytest.fixture(scope='module')
def model():
    dense = linear_numpy.variables(1)['params']['Dense_0']
    return {name: 2 * value for name, value in dense.items()}


def taken(model, perturbation, options):
    """The gradient of the step: it is the move of SGD with a learning rate of one."""
    optimiser = optax.sgd(1.0)
    before = state.create({'params': {'Dense_0': model}}, optimiser)
    batch = {
        'images': jnp.asarray(IMAGES),
        'labels': jnp.asarray(LABELS),
        'constants': {'images': jnp.asarray(INNER_IMAGES), 'labels': jnp.asarray(INNER_LABELS)},
    }
    step = jax.jit(partial(i_bau.unlearning_step, module=Linear(), optimiser=optimiser, options=options))
    start = i_bau.UnlearningState(before, jnp.asarray(perturbation.reshape(4, 4, 1), jnp.float32))
    after, metrics = step(start, batch, jax.random.key(0))
    assert int(after.step) == 1
    np.testing.assert_array_equal(after.perturbation, start.perturbation)
    new = after.classifier.params['Dense_0']
    return {name: np.asarray(model[name] - new[name], np.float64) for name in model}, metrics


def test_unlearning_step_takes_the_gradient_of_the_nested_problem(model):
    """Central differences of L1 at the perturbation that solves the inner problem for each kernel."""
    kernel, bias = (model[name].astype(np.float64) for name in ('kernel', 'bias'))
    solution = solve_inner(kernel, bias)
    assert np.linalg.norm(solution) > 0.1
    actual, metrics = taken(model, solution, OPTIONS)

    def nested(kernel, bias):
        return outer(kernel, bias, solve_inner(kernel, bias))[0]

    expected = np.zeros((16, 2))
    for place in np.ndindex(16, 2):
        move = np.zeros((16, 2))
        move[place] = 1e-4
        expected[place] = (nested(kernel + move, bias) - nested(kernel - move, bias)) / 2e-4
    np.testing.assert_allclose(actual['kernel'], expected, atol=1e-5)
    for unit in range(2):
        move = 1e-4 * np.eye(2)[unit]
        slope = (nested(kernel, bias + move) - nested(kernel, bias - move)) / 2e-4
        np.testing.assert_allclose(actual['bias'][unit], slope, atol=1e-5)
    np.testing.assert_allclose(metrics['loss'], nested(kernel, bias), atol=1e-5)
    # The implicit term matters: it is far larger than the tolerance.
    assert metrics['implicit_norm'] > 1e-3


@pytest.mark.parametrize('terms', [1, 5, 60])
def test_neumann_vector_equals_a_solved_system(model, terms):
    """Its matrix is written down; many terms solve the system (I - J)^T v = dL1/dd, few are the partial sum."""
    model = {name: value / 2 for name, value in model.items()}  # the series converges here too
    kernel, bias = (model[name].astype(np.float64) for name in ('kernel', 'bias'))
    d = np.linspace(-0.3, 0.3, 16)
    p = softmax((flat(INNER_IMAGES) + d) @ kernel + bias)
    curvature = np.mean([kernel @ (np.diag(q) - np.outer(q, q)) @ kernel.T for q in p], axis=0)
    jacobian = np.eye(16) - 0.3 * (2 * OPTIONS.penalty * np.eye(16) - curvature)
    direct = outer(kernel, bias, d)[1]
    if terms == 60:
        expected = np.linalg.solve((np.eye(16) - jacobian).T, direct)
    else:
        expected = sum(np.linalg.matrix_power(jacobian.T, k) @ direct for k in range(terms))

    @jax.jit
    def compute(d, direct):
        def inner_step(d):
            def loss(d):
                z = (jnp.asarray(flat(INNER_IMAGES), jnp.float32) + d[None]) @ model['kernel'] + model['bias'][None]
                entropy = optax.softmax_cross_entropy_with_integer_labels(z, jnp.asarray(INNER_LABELS)).mean()
                return i_bau.penalised(entropy, d, OPTIONS)

            return d - 0.3 * jax.grad(loss)(d)

        return i_bau.neumann_vector(inner_step, d, direct, terms, unroll=False)

    np.testing.assert_allclose(compute(jnp.float32(d), jnp.float32(direct)), expected, rtol=1e-4, atol=1e-5)


def test_search_step_equals_numpy_and_starts_each_round_at_zero(model):
    """Steps 0 to 2 of a round of three, then the first of the next; a radius cuts the last ones."""
    kernel, bias = (model[name].astype(np.float64) for name in ('kernel', 'bias'))
    options = OPTIONS._replace(penalty=0.05, radius=0.4)
    optimiser = optax.sgd(1.0)
    classifier = state.create({'params': {'Dense_0': model}}, optimiser)
    current = i_bau.UnlearningState(classifier, jnp.ones((4, 4, 1)))
    step = jax.jit(partial(i_bau.search_step, module=Linear(), options=options, round_steps=3))
    batch = {'images': jnp.asarray(IMAGES), 'labels': jnp.asarray(1 - LABELS)}  # the true labels play no role
    predicted = (flat(IMAGES) @ kernel + bias).argmax(axis=1)
    d, lengths = np.zeros(16), []
    for count in range(4):
        d = np.zeros(16) if count in (0, 3) else d
        error = (softmax((flat(IMAGES) + d) @ kernel + bias) - np.eye(2)[predicted]) / 8
        d = d - 0.5 * (-(error @ kernel.T).sum(axis=0) + 2 * 0.05 * d)
        lengths.append(np.linalg.norm(d))
        d *= min(1, 0.4 / lengths[-1])
        current, metrics = step(current, batch, jax.random.key(count))
        np.testing.assert_allclose(np.ravel(current.perturbation), d, atol=1e-5)
        np.testing.assert_allclose(metrics['perturbation'], np.linalg.norm(d), atol=1e-5)
        assert int(current.step) == count + 1
    assert lengths[0] < 0.4 < lengths[2]
    np.testing.assert_array_equal(current.classifier.params['Dense_0']['kernel'], model['kernel'])


def test_purify_alternates_search_and_unlearning(config, dataset, tiny_net, tiny_variables, make_run, monkeypatch):
    data = DefenderData(tiny_net, tiny_variables, dataset.train_images[:32], dataset.train_labels[:32])
    config.i_bau.update({'rounds': 2, 'fixed_point_steps': 2, 'learning_rates': (0.003, 0.01), 'perturbed_share': 1.0})
    config.tuning.budget = 1.0
    run = make_run()
    purified, trained = run_twice('i_bau', run, data, config, monkeypatch)
    assert list(trained) == ['purify/i_bau/0.003', 'purify/i_bau/0.01']
    jax.tree.map(np.testing.assert_array_equal, purified.variables['batch_stats'], tiny_variables['batch_stats'])
    record = [line for line in lines(run) if line['stage'] == 'purify/i_bau/0.01']
    # 24 images in batches of 8: three steps of each pass.
    assert ['fooled' in line for line in record] == ([True] * 3 + [False] * 3) * 2
    infected, params = as_numpy(tiny_variables['params']), as_numpy(purified.variables['params'])
    assert not np.allclose(params['Dense_0']['kernel'], infected['Dense_0']['kernel'], atol=1e-3)


@pytest.mark.parametrize(
    ('field', 'value', 'sentence'),
    [
        ('rounds', 0, 'i_bau.rounds=0 must be positive'),
        ('perturbed_share', 0.0, 'i_bau.perturbed_share=0.0 is a share: above 0'),
        ('radius', -1.0, 'i_bau.radius=-1.0 must not be negative'),
    ],
)
def test_validate_names_wrong_values(config, field, value, sentence):
    config.i_bau[field] = value
    with pytest.raises(UserError, match=sentence):
        validate(config)
