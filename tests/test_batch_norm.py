"""BatchNorm against flax: outputs, statistics and all gradients; its gradient formula against NumPy in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aft_jax.ops.batch_norm import BatchNorm, normalised_by_batch


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    x = generator.normal(2.0, [0.5, 1.0, 3.0], size=(6, 4, 5, 3))
    scale, bias = generator.normal(1.0, 0.3, size=(2, 3))
    mean, var = generator.normal(size=3), generator.uniform(0.5, 2.0, size=3)
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, scale, bias, mean, var))


def applied(kind, arrays, **options):
    x, scale, bias, mean, var = arrays
    module = kind(momentum=0.9, epsilon=1e-5)
    variables = {'params': {'scale': scale, 'bias': bias}, 'batch_stats': {'mean': mean, 'var': var}}
    return module.apply(variables, x, mutable=['batch_stats'], **options)


@pytest.mark.parametrize('average', [True, False])
@pytest.mark.parametrize('moptions', [True, False])
def test_batch_norm_outputs_and_statistics_equal_flax(arrays, average, moptions):
    options = {'use_running_average': average}
    if moptions and not average:
        options['mask'] = jnp.arange(6).reshape(-1, 1, 1, 1) < 4
    expected, actual = (applied(kind, arrays, **options) for kind in (nn.BatchNorm, BatchNorm))
    jax.tree.map(lambda e, f: np.testing.assert_allclose(f, e, rtol=2e-6, atol=2e-6, strict=True), expected, actual)


def test_batch_norm_gradients_equal_flax(arrays):
    _, moved = applied(BatchNorm, arrays, use_running_average=False)
    generator = np.random.default_rng(1)
    weights = jax.tree.map(
        lambda a: jnp.asarray(generator.normal(size=a.shape), jnp.float32), (arrays[0], moved['batch_stats'])
    )

    def gradients(kind):
        def objective(arrays):
            y, changes = applied(kind, arrays, use_running_average=False)
            # The kept statistics move by a tenth of the batch's.
            return sum(
                jnp.vdot(w, v) for w, v in zip(jax.tree.leaves(weights), jax.tree.leaves((y, changes)), strict=True)
            )

        return jax.grad(objective)(arrays)

    for expected, actual in zip(gradients(nn.BatchNorm), gradients(BatchNorm), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5, strict=True)


def test_normalised_by_batch_gradient_equals_the_formula_in_float64(arrays):
    x, scale, bias = (np.asarray(a, np.float64) for a in arrays[:3])
    dy = np.random.default_rng(2).normal(size=x.shape)
    r = 1 / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    u = (x - x.mean((0, 1, 2))) * r
    of_x = scale * r * (dy - dy.mean((0, 1, 2)) - u * (dy * u).mean((0, 1, 2)))
    expected = of_x, (dy * u).sum((0, 1, 2)), dy.sum((0, 1, 2))
    _, gradient = jax.vjp(lambda *a: normalised_by_batch(*a, 1e-5)[0], *arrays[:3])
    for e, f in zip(expected, gradient(jnp.asarray(dy, jnp.float32)), strict=True):
        np.testing.assert_allclose(f, e, rtol=2e-5, atol=2e-5)


def test_normalised_by_batch_of_a_constant_has_no_gradient(arrays):
    _, scale, bias, *_ = arrays
    x = jnp.full((4, 2, 2, 3), 3.0)
    y, gradient = jax.vjp(lambda x: normalised_by_batch(x, scale, bias, 1e-5)[0], x)
    np.testing.assert_allclose(y, jnp.broadcast_to(bias[None, None, None, :], x.shape), atol=1e-6)
    np.testing.assert_allclose(gradient(jnp.ones_like(x))[0], 0.0, atol=1e-4)


def test_batch_norm_variables_are_named_as_in_flax(arrays):
    class Network(nn.Module):
        kind: type

        @nn.compact
        def __call__(self, x):
            return self.kind(use_running_average=False)(x)

    expected, actual = (Network(kind).init(jax.random.key(0), arrays[0]) for kind in (nn.BatchNorm, BatchNorm))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda e, f: np.testing.assert_array_equal(f, e, strict=True), expected, actual)
