"""The order of batches."""

import numpy as np
import pytest

from aft_jax.data.order import Order, count_steps


def stream(order, steps):
    return np.concatenate([order.batch(step) for step in range(steps)])


# A batch that divides the data, one that straddles epochs, and one larger than the data.
@pytest.mark.parametrize(('size', 'batch_size'), [(12, 4), (10, 4), (5, 12), (7, 7)])
def test_batch_has_every_image_once_per_epoch(size, batch_size):
    order = Order(0, 'infect', size, batch_size)
    epochs = 12
    batches = [order.batch(step) for step in range(size * epochs // batch_size)]
    assert all(b.shape == (batch_size,) and b.dtype == np.int32 for b in batches)
    indices = np.concatenate(batches)
    whole = len(indices) // size
    assert whole >= 11
    passes = indices[: whole * size].reshape(whole, size)
    np.testing.assert_array_equal(np.sort(passes, axis=1), np.tile(np.arange(size), (whole, 1)))
    assert len({tuple(p) for p in passes}) == whole  # each epoch in an order of its own


def test_batch_depends_only_on_its_step():
    order = Order(3, 'infect', 10, 4)
    forwards = [order.batch(step) for step in range(20)]
    for step in (19, 0, 7, 6, 12, 7):
        np.testing.assert_array_equal(order.batch(step), forwards[step])
        np.testing.assert_array_equal(Order(3, 'infect', 10, 4).batch(step), forwards[step])


def test_order_of_each_seed_and_purpose_is_independent():
    streams = [
        stream(Order(seed, purpose, 50, 10), 10)
        for seed, purpose in [(0, 'infect/0'), (1, 'infect/0'), (0, 'infect/1'), (0, 'purify/aft/0')]
    ]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert np.mean(one == other) < 0.15  # 2 % by chance


def test_order_does_not_depend_on_the_batch_size():
    np.testing.assert_array_equal(stream(Order(0, 'x', 10, 4), 15), stream(Order(0, 'x', 10, 12), 5))


@pytest.mark.parametrize(
    ('size', 'epochs', 'batch_size', 'steps'), [(100, 2, 10, 20), (100, 1, 64, 2), (100, 1, 80, 1), (10, 0.1, 128, 1)]
)
def test_count_steps(size, epochs, batch_size, steps):
    assert count_steps(size, epochs, batch_size) == steps
