"""The order of training images: a pure function of (seed, purpose, step)."""

import functools

import numpy as np

from aft_jax.randomness import generator_for


class Order:
    """An endless stream of image indices, one shuffled epoch after another, cut into batches.

    A batch may span two epochs, so no image is left out, and a step depends on nothing but its number.
    """

    def __init__(self, seed: int, purpose: str, size: int, batch_size: int):
        """Creates the order of `size` images in batches of `batch_size`; `purpose` separates independent streams."""
        self.size = size
        self.batch_size = batch_size
        # A batch has images of at most two epochs, unless the batch is larger than the data.
        self._epoch = functools.lru_cache(maxsize=2)(
            lambda epoch: generator_for(seed, f'{purpose}/order', epoch).permutation(size).astype(np.int32)
        )

    def batch(self, step: int) -> np.ndarray:
        """Returns the int32 [batch_size] indices of a step, counted from 0."""
        first = step * self.batch_size
        parts = []
        remaining = self.batch_size
        while remaining:
            epoch, offset = divmod(first, self.size)
            part = self._epoch(epoch)[offset : offset + remaining]
            parts.append(part)
            first += len(part)
            remaining -= len(part)
        return np.concatenate(parts)


def count_steps(size: int, epochs: float, batch_size: int) -> int:
    """Computes the number of steps in `epochs` epochs of `size` images, rounded to the nearest, at least one."""
    return max(1, round(epochs * size / batch_size))
