"""What the parity tests put into both implementations.

Everything is drawn by `numpy.random.RandomState`, whose stream is frozen for good, so that inputs and weights need not
be stored: only what torch made of them is.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np

from aft_jax.attacks.input_aware import Networks
from aft_jax.attacks.input_aware_networks import networks_for
from aft_jax.models.preact_resnet import PreActResNet
from benchmarks.task import weights

# (height, width) of a grid, and of the image that it becomes.
BICUBIC_SIZES = {'28': (4, 4, 28, 28), '32': (4, 4, 32, 32), '64': (5, 3, 64, 64), 'oblong': (4, 4, 20, 36)}
IMAGE_SHAPES = {'grey28': (28, 28, 1), 'colour32': (32, 32, 3)}
WANET_SHAPES = IMAGE_SHAPES | {'grey64': (64, 64, 1)}
WANET_STRENGTH = 0.5
# PreActResNet18 of (width, final_norm). The narrow ones exercise every layer and are compiled fast.
STORED_NETWORKS = ((8, False), (8, True))
LIVE_NETWORKS = ((8, True), (64, False))


class Classifier(NamedTuple):
    """A PreActResNet18 and what it is asked."""

    module: PreActResNet
    variables: dict
    images: np.ndarray
    labels: np.ndarray


def uniform(seed: int, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Returns float32 of `shape`, uniform between `low` and `high`."""
    return np.random.RandomState(seed).uniform(low, high, shape).astype(np.float32)


def variables_of(module: nn.Module, image_shape: tuple[int, int, int], seed: int) -> dict:
    """Returns variables of the module: He weights, and norms that are neither fresh nor all alike."""
    return weights(module, image_shape, np.random.RandomState(seed), gain=2.0)


def classifier(width: int, final_norm: bool = False) -> Classifier:
    """Returns the PreActResNet18 of that width, with two colour images of 32x32."""
    module = PreActResNet(
        num_classes=10, width=width, final_norm=final_norm, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)
    )
    variables = variables_of(module, (32, 32, 3), seed=11)
    return Classifier(module, variables, uniform(12, (2, 32, 32, 3)), np.array([3, 7], np.int32))


def input_aware(image_shape: tuple[int, int, int]) -> tuple[Networks, dict]:
    """Returns both networks of the input-aware attack and their variables."""
    networks = Networks(*networks_for(image_shape))
    modules = networks._asdict().items()
    return networks, {name: variables_of(module, image_shape, seed) for seed, (name, module) in enumerate(modules)}


def wanet_noise(image_shape: tuple[int, int, int]) -> tuple[jax.Array, np.ndarray]:
    """Returns a key, and the noise U(-1, 1) float32 [2, H, W, 2] that the attack draws from it."""
    key = jax.random.key(21)
    return key, np.asarray(jax.random.uniform(key, (2, *image_shape[:2], 2), np.float32, -1.0, 1.0))
