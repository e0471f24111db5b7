"""A dense layer's product is NumPy's, and so are its gradients, on every device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aft_jax.models.product import plain_gradient, product, turned_first

PLAIN = (((1,), (0,)), ((), ()))


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    return [jnp.asarray(generator.normal(size=size), jnp.float32) for size in ((6, 5), (5, 4), (6, 4))]


def test_product_and_gradients(arrays):
    x, weights, out = arrays
    y, gradient = jax.vjp(lambda x, w: product(x, w, PLAIN, precision=None), x, weights)
    wide = [np.asarray(a, np.float64) for a in arrays]
    for expected, found in zip(
        (wide[0] @ wide[1], wide[2] @ wide[1].T, wide[0].T @ wide[2]), (y, *gradient(out)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('of_weights', [plain_gradient, turned_first])
def test_gradient_of_the_weights(arrays, of_weights):
    x, _, out = arrays
    expected = np.asarray(x, np.float64).T @ np.asarray(out, np.float64)
    np.testing.assert_allclose(of_weights(x, out), expected, rtol=1e-5, atol=1e-5)


def test_gradients_under_vmap(arrays):
    x, weights, _ = arrays
    gradient = jax.grad(lambda w, x: product(x, w, PLAIN).sum())
    found = jax.vmap(gradient, in_axes=(0, None))(jnp.stack([weights, 2 * weights]), x)
    expected = np.broadcast_to(np.asarray(x, np.float64).sum(0)[None, :, None], found.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_another_product_is_an_error(arrays):
    x, weights, _ = arrays
    with pytest.raises(ValueError, match='not a plain product'):
        product(x, weights.T, (((1,), (1,)), ((), ())))
    with pytest.raises(ValueError, match='precision'):
        product(x, weights, PLAIN, precision='highest')
