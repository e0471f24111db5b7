"""The convolution for CPUs and its gradients equal XLA's up to rounding, in a loop as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aft_jax.ops import convolution
from aft_jax.ops.convolution import cpu_gradients, nearest_divisor, plain_gradients

# (batch, height, width, channels in, channels out, kernel, stride, padding)
CASES = {
    'same': (6, 8, 8, 3, 4, 3, (1, 1), ((1, 1), (1, 1))),
    'stride 2': (5, 9, 7, 2, 3, 3, (2, 2), ((1, 1), (1, 1))),
    'stride 2 on even sides': (4, 8, 8, 2, 3, 3, (2, 2), ((1, 1), (1, 1))),
    '1x1, stride 2': (4, 8, 8, 5, 3, 1, (2, 2), ((0, 0), (0, 0))),
    '7x7, stride 2': (4, 9, 8, 3, 4, 7, (2, 2), ((3, 3), (3, 3))),
    'uneven': (3, 10, 11, 2, 2, 5, (3, 2), ((2, 1), (0, 3))),
}


@pytest.fixture(params=CASES)
def case(request):
    batch, height, width, channels, out_channels, side, strides, padding = CASES[request.param]
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(batch, height, width, channels)), jnp.float32)
    kernel = jnp.asarray(generator.normal(size=(side, side, channels, out_channels)), jnp.float32)
    shape = convolution.plain(x, kernel, strides, padding).shape
    return x, kernel, jnp.asarray(generator.normal(size=shape), jnp.float32), strides, padding


@pytest.mark.parametrize('patch_bytes', [1, 3000, 10**9])
def test_cpu_gradients_in_parts_equal_the_plain_ones(case, patch_bytes, monkeypatch):
    monkeypatch.setattr(convolution, 'PATCH_BYTES', patch_bytes)
    monkeypatch.setattr(convolution, 'FEWEST_IMAGES', 1)
    for expected, actual in zip(plain_gradients(*case), cpu_gradients(*case), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-5, strict=True)


def test_by_patches_equals_the_plain_convolution(case):
    x, kernel, _, strides, padding = case
    expected = convolution.plain(x, kernel, strides, padding)
    np.testing.assert_allclose(convolution._by_patches(x, kernel, strides, padding), expected, rtol=2e-6, atol=2e-5)


def test_cpu_gradients_in_a_loop_equal_the_plain_ones(case):
    x, kernel, out, strides, padding = case

    @jax.jit
    def summed(x, kernel, out):
        def add(total, _):
            return jax.tree.map(jnp.add, total, cpu_gradients(x, kernel, out, strides, padding)), None

        return jax.lax.scan(add, (jnp.zeros_like(x), jnp.zeros_like(kernel)), None, length=3)[0]

    for expected, actual in zip(plain_gradients(*case), summed(x, kernel, out), strict=True):
        np.testing.assert_allclose(actual, 3 * expected, rtol=2e-6, atol=6e-5, strict=True)


def test_convolve_uses_cpu_gradients_on_a_single_cpu_device(monkeypatch):
    """The suite has four devices, so this test changes the count."""
    x, kernel = jnp.ones((4, 8, 8, 2), jnp.float32), jnp.ones((3, 3, 2, 2), jnp.float32)

    def gradient(x, kernel):
        return jax.grad(lambda w: convolution.convolve(x, w, (1, 1), ((1, 1), (1, 1))).sum())(kernel)

    monkeypatch.setattr(convolution, 'PATCH_BYTES', 1)
    monkeypatch.setattr(convolution, 'FEWEST_IMAGES', 1)
    plain = jax.jit(gradient).lower(x, kernel).as_text()
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    jax.clear_caches()
    assert 'stablehlo.while' not in plain
    assert 'stablehlo.while' in jax.jit(gradient).lower(x, kernel).as_text()


def test_convolve_rejects_an_unusual_convolution():
    x, kernel = jnp.ones((1, 8, 8, 2), jnp.float32), jnp.ones((3, 3, 1, 2), jnp.float32)
    with pytest.raises(ValueError, match='feature_group_count'):
        convolution.convolve(x, kernel, (1, 1), ((1, 1), (1, 1)), feature_group_count=2)


@pytest.mark.parametrize(
    'number, target, divisor', [(128, 5.0, 4), (26, 8.0, 13), (7, 3.0, 7), (6, 0.1, 1), (1, 9.0, 1)]
)
def test_nearest_divisor(number, target, divisor):
    assert nearest_divisor(number, target) == divisor
