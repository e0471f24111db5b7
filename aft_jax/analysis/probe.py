"""What a classifier makes of images: adversarial examples, classes, channels and distances in its last feature map.

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
# Steps go this much further, together, than the radius.
REACH = 2.5


class Probe:
    """Compiled functions of (variables, stored images) for every model of one architecture; each compiles when used."""

    def __init__(self, module: nn.Module, mesh: Mesh, batch_size: int, steps: int = STEPS):
        """Looks into classifiers like `module`.

        Args:
            module: The architecture; `apply(..., features=True)` returns (logits, feature maps).
            mesh: The devices.
            batch_size: As for `BatchedFunction`.
            steps: Of PGD.
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
        """Returns untargeted PGD examples, float32 [N, H, W, C], not rounded.

        Args:
            variables: The model's.
            images: uint8 [N, H, W, C].
            labels: int32 [N], to be left.
            norm: 'linf' or 'l2'.
            eps: The change allowed to a pixel, in [0, 1]: the largest one (linf), or the root mean square over the
                image (l2, whose radius is eps sqrt(H W C)).
        """
        radius = eps if norm == 'linf' else eps * float(np.prod(images.shape[1:])) ** 0.5
        given = {'model': dict(variables), 'radius': np.float32(radius)}
        return self._adversarial[norm](given, images, labels)

    def channels(self, variables: dict, images: np.ndarray) -> np.ndarray:
        """Returns the mean activation of each channel of the last feature map, float32 [N, C]."""
        return self._channels(variables, images)

    def distances(self, variables: dict, images: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Returns the L2 distance of each image from the other one, in the last feature map, float32 [N]."""
        return self._distances(variables, images, others)


def _perturbed(
    module: nn.Module, norm: Norm, steps: int, given: Any, images: jax.Array, labels: jax.Array
) -> jax.Array:
    pgd = PGD(given['radius'], REACH / steps * given['radius'], steps, norm)
    model = logits_function(module, given['model'])
    return perturb(model, images, labels, jax.random.key(0), pgd)


def _last_features(module: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
    """The last feature map [B, H, W, C], in float32."""
    _, stages = cast(tuple, module.apply(variables, images, features=True))
    return stages[-1].astype(jnp.float32)


def _channels(module: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
    maps = _last_features(module, variables, images)
    return maps.mean(axis=tuple(range(1, maps.ndim - 1)))


def _distances(module: nn.Module, variables: Any, images: jax.Array, others: jax.Array) -> jax.Array:
    apart = _last_features(module, variables, images) - _last_features(module, variables, float_images(others))
    return jnp.sqrt(jnp.square(apart).sum(axis=tuple(range(1, apart.ndim))))
