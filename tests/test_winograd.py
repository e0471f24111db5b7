"""Winograd convolutions and their gradients equal those of NumPy in float64 up to float32 rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from aft_jax.ops import convolution, winograd

# (batch, height, width, channels in, channels out, padding)
CASES = {
    'whole tiles': (6, 8, 8, 5, 4, ((1, 1), (1, 1))),
    'cut tiles': (4, 7, 10, 3, 6, ((1, 1), (1, 1))),
    'smaller than a tile': (3, 2, 3, 4, 4, ((1, 1), (1, 1))),
    'uneven padding': (2, 9, 6, 3, 3, ((0, 2), (2, 1))),
    'no padding': (2, 6, 11, 2, 5, ((0, 0), (0, 0))),
}


@pytest.fixture(params=CASES)
def case(request):
    batch, height, width, channels, out_channels, padding = CASES[request.param]
    generator = np.random.default_rng(0)
    x = generator.normal(size=(batch, height, width, channels))
    kernel = generator.normal(size=(3, 3, channels, out_channels))
    return x, kernel, generator.normal(size=np.shape(correlated(x, kernel, padding))), padding


def windows(x, padding):
    return sliding_window_view(np.pad(x, ((0, 0), *padding, (0, 0))), (3, 3), axis=(1, 2))


def correlated(x, kernel, padding):
    return np.einsum('bhwcij,ijcd->bhwd', windows(x, padding), kernel)


def same(actual, expected):
    assert actual.dtype == jnp.float32
    # Rounding errors grow with the summands, not with the sum.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.fixture(params=[1, 10**9], ids=['in parts', 'at once'], autouse=True)
def part_bytes(request, monkeypatch):
    monkeypatch.setattr(winograd, 'PART_BYTES', request.param)


def test_convolve(case):
    x, kernel, _, padding = case
    same(winograd.convolve(jnp.float32(x), jnp.float32(kernel), padding), correlated(x, kernel, padding))


def test_input_gradient(case):
    x, kernel, out, padding = case
    full = [(2 - before, 2 - after) for before, after in padding]
    expected = correlated(out, kernel[::-1, ::-1].swapaxes(2, 3), full)
    assert expected.shape == x.shape
    same(winograd.input_gradient(jnp.float32(out), jnp.float32(kernel), padding), expected)


def test_kernel_gradient(case):
    x, _, out, padding = case
    expected = np.einsum('bhwcij,bhwd->ijcd', windows(x, padding), out)
    same(winograd.kernel_gradient(jnp.float32(x), jnp.float32(out), padding), expected)


def test_convolve_rounds_little_more_than_the_plain_sum():
    generator = np.random.default_rng(1)
    x, kernel = generator.normal(size=(2, 16, 16, 64)), generator.normal(size=(3, 3, 64, 64))
    x, kernel = np.float32(x), np.float32(kernel)
    expected = correlated(np.float64(x), np.float64(kernel), ((1, 1), (1, 1)))

    def error(actual):
        return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))

    plain = convolution.plain(jnp.asarray(x), jnp.asarray(kernel), (1, 1), ((1, 1), (1, 1)))
    ours = winograd.convolve(jnp.asarray(x), jnp.asarray(kernel), ((1, 1), (1, 1)))
    assert error(ours) < max(4 * error(plain), 1e-6)


@pytest.mark.parametrize(
    'channels, strides, dtype, used',
    [(32, (1, 1), jnp.float32, True), (31, (1, 1), jnp.float32, False), (32, (2, 2), jnp.float32, False),
     (32, (1, 1), jnp.bfloat16, False)],
)  # fmt: skip
def test_convolve_on_a_cpu_uses_winograd_for_wide_layers_of_stride_1(channels, strides, dtype, used, monkeypatch):
    """The suite has four devices, so this test changes the count."""
    called = []
    monkeypatch.setattr(
        winograd, 'convolve', lambda *args: called.append('forward') or convolution.plain(*args[:2], (1, 1), args[2])
    )
    monkeypatch.setattr(
        winograd, 'input_gradient', lambda out, *_: called.append('input') or jnp.zeros((1, 8, 8, channels))
    )
    monkeypatch.setattr(
        winograd, 'kernel_gradient', lambda *_: called.append('kernel') or jnp.zeros((3, 3, channels, 32))
    )
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    x, kernel = jnp.ones((1, 8, 8, channels), dtype), jnp.ones((3, 3, channels, 32), dtype)

    def value(x, kernel):
        return convolution.convolve(x, kernel, strides, ((1, 1), (1, 1))).astype(jnp.float32).sum()

    jax.grad(value, argnums=(0, 1))(x, kernel)
    assert sorted(set(called)) == (['forward', 'input', 'kernel'] if used else [])
