"""FT-SAM: its move on a quadratic, its step against NumPy, and what a whole run trains."""

from functools import partial

import jax
import jax.numpy as jnp
import linear_numpy
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from defense_runs import as_numpy, lines, run_twice
from linear_numpy import IMAGES, LABELS, flat, softmax
from toys import Linear

from aft_jax.data.augment import AugmentOptions
from aft_jax.defenses import DefenderData, ft_sam
from aft_jax.errors import UserError
from aft_jax.training import state
from aft_jax.training.optimiser import sgd
from aft_jax.training.state import TrainState
from aft_jax.validation import validate

NO_AUGMENTATION = AugmentOptions(crop=0, flip=False, rotation=0.0)


def test_worst_move_maximises_the_linear_model_of_a_quadratic():
    """SciPy maximises <g, e> over |e / w| <= rho, with g of a quadratic over two arrays."""
    generator = np.random.default_rng(0)
    weights, matrix = generator.normal(size=5), generator.normal(size=(5, 5))
    gradient, rho = matrix @ matrix.T @ weights, 0.7
    best = scipy.optimize.minimize(
        lambda u: -gradient @ (weights * u),
        np.full(5, 0.1),
        jac=lambda u: -gradient * weights,
        constraints={'type': 'ineq', 'fun': lambda u: rho**2 - u @ u, 'jac': lambda u: -2 * u},
        options={'ftol': 1e-14},
    )
    params, slopes = ({'a': jnp.float32(v[:2]), 'b': {'c': jnp.float32(v[2:])}} for v in (weights, gradient))
    move = ft_sam.worst_move(params, slopes, rho)
    np.testing.assert_allclose(np.concatenate([move['a'], move['b']['c']]), weights * best.x, atol=1e-4)
    jax.tree.map(
        np.testing.assert_array_equal,
        ft_sam.worst_move(params, jax.tree.map(jnp.zeros_like, slopes), rho),
        {'a': np.zeros(2, np.float32), 'b': {'c': np.zeros(3, np.float32)}},
    )


def test_sam_step_equals_numpy():
    """Two steps of a linear classifier; the momentum is that of the gradients at the worst points."""
    rho, rate, targets = 0.5, 0.3, np.array([[0.2, 0.8], [0.8, 0.2]])[1 - LABELS]
    model = linear_numpy.variables(4)
    kernel, bias = (model['params']['Dense_0'][name].astype(np.float64) for name in ('kernel', 'bias'))

    def loss_and_slopes(kernel, bias):
        z = flat(IMAGES) @ kernel + bias
        error = (softmax(z) - targets) / 8
        loss = -(targets * scipy.special.log_softmax(z, axis=1)).sum(axis=1).mean()
        return loss, (flat(IMAGES).T @ error, error.sum(axis=0))

    optimiser = sgd(rate, 'constant', 2, momentum=0.9, weight_decay=0.01)
    step = jax.jit(
        partial(
            ft_sam.sam_step,
            module=Linear(),
            optimiser=optimiser,
            rho=rho,
            smoothing=0.2,
            augmentation=NO_AUGMENTATION,
        )
    )
    current, momenta = state.create(model, optimiser), (np.zeros((16, 2)), np.zeros(2))
    batch = {'images': jnp.asarray(IMAGES), 'labels': jnp.asarray(LABELS)}
    for _ in range(2):
        params = kernel, bias
        loss, slopes = loss_and_slopes(*params)
        norm = np.sqrt(sum(((w * g) ** 2).sum() for w, g in zip(params, slopes, strict=True)))
        worst = [w + rho * w**2 * g / norm for w, g in zip(params, slopes, strict=True)]
        sharp_loss, slopes = loss_and_slopes(*worst)
        assert sharp_loss > loss + 0.01
        momenta = [0.9 * m + g + 0.01 * w for m, g, w in zip(momenta, slopes, params, strict=True)]
        kernel, bias = (w - rate * m for w, m in zip(params, momenta, strict=True))
        current, metrics = step(current, batch, jax.random.key(0))
        np.testing.assert_allclose(current.params['Dense_0']['kernel'], kernel, atol=1e-5)
        np.testing.assert_allclose(current.params['Dense_0']['bias'], bias, atol=1e-5)
        np.testing.assert_allclose([metrics['loss'], metrics['sharp_loss']], [loss, sharp_loss], atol=1e-5)


def test_smoothed_cross_entropy_equals_numpy_for_three_classes():
    z = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    targets = np.array([[0.05, 0.9, 0.05], [0.9, 0.05, 0.05]])
    expected = -(targets * scipy.special.log_softmax(z, axis=1)).sum(axis=1).mean()
    actual = ft_sam.smoothed_cross_entropy(jnp.float32(z), jnp.array([1, 0]), 0.1)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_sam_step_takes_statistics_from_the_first_pass(tiny_net, tiny_variables, dataset):
    """The radius changes the parameters after the step and not the running statistics."""
    optimiser = sgd(0.1, 'constant', 1, momentum=0.0, weight_decay=0.0)
    batch = {
        'images': jnp.asarray(dataset.train_images[:8], jnp.float32) / 255,
        'labels': jnp.asarray(dataset.train_labels[:8]),
    }

    def after(rho: float) -> TrainState:
        step = partial(
            ft_sam.sam_step,
            module=tiny_net,
            optimiser=optimiser,
            rho=rho,
            smoothing=0.1,
            augmentation=NO_AUGMENTATION,
        )
        return jax.jit(step)(state.create(tiny_variables, optimiser), batch, jax.random.key(0))[0]

    plain, sharp = after(0.0), after(2.0)
    for name in ('mean', 'var'):
        actual, expected = (s.batch_stats['BatchNorm_0'][name] for s in (sharp, plain))
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert not np.allclose(sharp.params['Dense_0']['kernel'], plain.params['Dense_0']['kernel'], atol=1e-4)


def test_purify_trains_every_rate(config, dataset, tiny_net, tiny_variables, make_run, monkeypatch):
    data = DefenderData(tiny_net, tiny_variables, dataset.train_images[:32], dataset.train_labels[:32])
    config.ft_sam.update({'epochs': 4, 'learning_rates': (0.02, 0.1), 'rho': 0.5})
    config.tuning.budget = 1.0
    run = make_run()
    purified, trained = run_twice('ft_sam', run, data, config, monkeypatch)
    assert list(trained) == ['purify/ft_sam/0.02', 'purify/ft_sam/0.1']
    strong = [line for line in lines(run) if line['stage'] == 'purify/ft_sam/0.1']
    assert strong[-1]['loss'] < strong[0]['loss'] < strong[0]['sharp_loss']
    jax.tree.map(
        np.testing.assert_array_equal,
        as_numpy(purified.variables['params']),
        as_numpy(trained['purify/ft_sam/0.1'].fitted.state.params),
    )


@pytest.mark.parametrize(
    ('field', 'value', 'sentence'),
    [
        ('rho', -1.0, 'ft_sam.rho=-1.0 must not be negative'),
        ('smoothing', 1.0, 'ft_sam.smoothing=1.0 must be at least 0 and below 1'),
    ],
)
def test_validate_names_wrong_values(config, field, value, sentence):
    config.ft_sam[field] = value
    with pytest.raises(UserError, match=sentence):
        validate(config)
