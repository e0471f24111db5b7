"""All randomness, as a pure function of (seed, purpose, counter).

No key and no generator is ever saved: a resumed run derives the same ones from the step number.
"""

import zlib

import jax
import numpy as np


def key_for(seed: int, purpose: str) -> jax.Array:
    """Derives the JAX key of a named purpose. Each step folds its own number into it.

    Args:
        seed: Seed of the experiment, the only source of randomness.
        purpose: Name such as 'infect'. Different names give independent keys.

    Returns:
        A scalar typed PRNG key.
    """
    key = jax.random.key(seed, impl='threefry2x32')  # by name: the default is a setting of JAX
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()))


def generator_for(seed: int, purpose: str, counter: int = 0) -> np.random.Generator:
    """Creates the NumPy generator of a named purpose, for choices that are made on the host.

    Args:
        seed: Seed of the experiment.
        purpose: Name such as 'poison'.
        counter: Further number, such as the epoch.

    Returns:
        A generator that depends on the three arguments alone.
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), counter])
