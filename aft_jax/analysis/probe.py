"""Compiled functions that probe a classifier: adversarial examples, predictions, and its last feature map.

PGD starts at the image itself, so that the results depend neither on batches nor on devices.
"""

from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aft_jax.adversarial.pgd import NORMS, PGD, Norm, perturb
from aft_jax.models import logits_function
from aft_jax.training.prediction import BatchedFunction, Predictor, float_images

STEPS = 10
# Length of all PGD steps together, in multiples of the radius.
REACH = 2.5


class ModelProbe:
    """Compiled functions of (variables, images) for all models of one architecture; each is compiled at its first use.

    Images [N, H, W, C] are uint8, or float32 in [0, 1]. A function is compiled for each of the two types that it gets.
    """

    def __init__(self, module: nn.Module, mesh: Mesh, batch_size: int, steps: int = STEPS):
        """Creates the functions for one architecture.

        Args:
            module: Architecture; `apply(..., features=True)` returns (logits, feature maps).
            mesh: Devices.
            batch_size: Images per call, rounded up to a multiple of the number of devices.
            steps: Number of PGD steps.
        """
        self.predict = Predictor(module, mesh, batch_size)
        self._adversarial = {
            norm: BatchedFunction(partial(_perturbed, module, norm, steps), module, mesh, batch_size) for norm in NORMS
        }
        self._channels = BatchedFunction(partial(_channels, module), module, mesh, batch_size)
        self._distances = BatchedFunction(partial(_distances, module), module, mesh, batch_size)

    def adversarial(
        self, variables: dict, images: np.ndarray, labels: np.ndarray, norm: Norm, eps: float
    ) -> np.ndarray:
        """Computes untargeted PGD examples, float32 [N, H, W, C], without rounding.

        Args:
            variables: Variables of the model.
            images: Images to perturb, uint8, or float32 in [0, 1].
            labels: Labels that the examples should not be classified as, int32 [N].
            norm: Norm of the perturbation, 'linf' or 'l2'.
            eps: Size of the perturbation of a pixel, in [0, 1]: the maximum (linf), or the root mean square over the
                image (l2, whose radius is eps sqrt(H W C)).
        """
        radius = eps if norm == 'linf' else eps * float(np.prod(images.shape[1:])) ** 0.5
        arguments = {'model': dict(variables), 'radius': np.float32(radius)}
        return self._adversarial[norm](arguments, images, labels)

    def channels(self, variables: dict, images: np.ndarray) -> np.ndarray:
        """Computes the mean activation of each channel of the last feature map, float32 [N, C]."""
        return self._channels(variables, images)

    def distances(self, variables: dict, images: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Computes the L2 distance in the last feature map between corresponding images, float32 [N]."""
        return self._distances(variables, images, others)


def _perturbed(
    module: nn.Module, norm: Norm, steps: int, arguments: Any, images: jax.Array, labels: jax.Array
) -> jax.Array:
    radius = arguments['radius']
    pgd = PGD(radius, REACH / steps * radius, steps, norm)
    model = logits_function(module, arguments['model'])
    return perturb(model, images, labels, jax.random.key(0), pgd)


def _last_features(module: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
    """Computes the last feature map [B, H, W, C], in float32."""
    _, block_outputs = cast(tuple, module.apply(variables, images, features=True))
    return block_outputs[-1].astype(jnp.float32)


def _channels(module: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
    maps = _last_features(module, variables, images)
    return maps.mean(axis=tuple(range(1, maps.ndim - 1)))


def _distances(module: nn.Module, variables: Any, images: jax.Array, others: jax.Array) -> jax.Array:
    difference = _last_features(module, variables, images) - _last_features(module, variables, float_images(others))
    return jnp.sqrt(jnp.square(difference).sum(axis=tuple(range(1, difference.ndim))))
