"""What a model says of many images: one compiled, sharded call a batch."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aft_jax.models import logits_function
from aft_jax.training.mesh import along, place, replicated, settle, spread

# (variables, float32 images [B, H, W, C] in [0, 1]) -> pytree of arrays [B, ...]
ImageFunction = Callable[[Any, jax.Array], Any]


class Batched:
    """A function of (variables, images) on any number of stored images."""

    def __init__(self, function: ImageFunction, mesh: Mesh, batch_size: int):
        """Applies `function` batch by batch; `batch_size` is rounded up to a multiple of the devices."""
        self._mesh = mesh
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        whole, cut = replicated(mesh), along(mesh, 0)

        def call(variables, images):
            return function(variables, images.astype(jnp.float32) / 255.0)

        self._call: Callable = jax.jit(call, in_shardings=(whole, cut), out_shardings=whole)

    def __call__(self, variables: Any, images: np.ndarray) -> Any:
        """Returns the pytree of arrays [N, ...] for uint8 images [N, H, W, C], N at least 1.

        The last batch is padded and the padding discarded.
        """
        variables = place(self._mesh, {name: variables[name] for name in variables})
        results = []
        for first in range(0, len(images), self._batch_size):
            part = images[first : first + self._batch_size]
            padding = np.zeros((self._batch_size - len(part), *images.shape[1:]), images.dtype)
            padded = np.concatenate([part, padding])
            images_there = spread(along(self._mesh, 0), padded.shape, padded.__getitem__)
            results.append((settle(self._mesh, self._call(variables, images_there)), len(part)))
        cut = [jax.tree.map(lambda x, n=count: np.asarray(x)[:n], result) for result, count in results]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *cut)


class Predictor(Batched):
    """Predicts the classes, int32 [N], of stored images, the model in evaluation mode."""

    def __init__(self, module: nn.Module, mesh: Mesh, batch_size: int):
        """Predicts with `module`; `batch_size` as for `Batched`."""

        def classes(variables: Any, images: jax.Array) -> jax.Array:
            return logits_function(module, variables)(images).argmax(axis=-1).astype(jnp.int32)

        super().__init__(classes, mesh, batch_size)
