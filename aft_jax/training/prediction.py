"""What a model says of many images: one compiled, sharded call a batch."""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aft_jax.models import logits_function
from aft_jax.models.cpu_compilation import compiler_options
from aft_jax.runtime.sharding import batch_sharding, replicate, replicated, wait_on_virtual_devices

# (variables, float32 images [B, H, W, C] in [0, 1], *rows [B, ...]) -> pytree of arrays [B, ...]
ImageFunction = Callable[..., Any]


def pixels(images: jax.Array) -> jax.Array:
    """Returns images in [0, 1]: stored bytes divided by 255, anything else as it is."""
    return images.astype(jnp.float32) / 255.0 if images.dtype == jnp.uint8 else images


def parts(mesh: Mesh, images: np.ndarray, batch_size: int) -> Iterator[tuple[jax.Array, int]]:
    """Yields stored images [N, H, W, C] in parts that the devices share, and how many images of each are no padding.

    Args:
        mesh: The devices.
        images: Of any dtype.
        batch_size: Of a part; rounded up to a multiple of the devices. The last part is padded with zeros.
    """
    size = -(-batch_size // mesh.size) * mesh.size
    for first in range(0, len(images), size):
        part = images[first : first + size]
        padded = np.concatenate([part, np.zeros((size - len(part), *images.shape[1:]), images.dtype)])
        yield jax.make_array_from_callback(padded.shape, batch_sharding(mesh, 0), padded.__getitem__), len(part)


class Batched:
    """A function of (variables, images) on any number of stored images."""

    def __init__(self, function: ImageFunction, module: nn.Module, mesh: Mesh, batch_size: int):
        """Applies `function` batch by batch.

        Args:
            function: What is applied.
            module: The network that does most of its work.
            mesh: The devices.
            batch_size: Rounded up to a multiple of the devices.
        """
        self._mesh, self._batch_size = mesh, batch_size
        whole, cut = replicated(mesh), batch_sharding(mesh, 0)

        def call(variables, images, rows):
            return function(variables, pixels(images), *rows)

        self._call: Callable = jax.jit(
            call, in_shardings=(whole, cut, cut), out_shardings=whole, compiler_options=compiler_options(module)
        )

    def __call__(self, variables: Any, images: np.ndarray, *rows: np.ndarray) -> Any:
        """Returns the pytree of arrays [N, ...] that the function gives for many images.

        The last batch is padded with zeros and what comes of the padding is discarded.

        Args:
            variables: A dict of arrays that every batch sees whole, such as a model's variables.
            images: [N, H, W, C], N at least 1: stored ones in uint8, or float32 in [0, 1] (adversarial examples, which
                rounding would change).
            *rows: Further arrays [N, ...] that go along with the images, such as labels.
        """
        variables = replicate(self._mesh, {name: variables[name] for name in variables})
        results = []
        for batch in zip(*(parts(self._mesh, x, self._batch_size) for x in (images, *rows)), strict=True):
            (there, count), *others = batch
            result = self._call(variables, there, tuple(row for row, _ in others))
            results.append((wait_on_virtual_devices(self._mesh, result), count))
        cut = [jax.tree.map(lambda x, n=count: np.asarray(x)[:n], result) for result, count in results]
        return jax.tree.map(lambda *results: np.concatenate(results), *cut)


class Predictor(Batched):
    """Predicts the classes, int32 [N], of stored images, the model in evaluation mode."""

    def __init__(self, module: nn.Module, mesh: Mesh, batch_size: int):
        """Predicts with `module`; `batch_size` as for `Batched`."""

        def classes(variables: Any, images: jax.Array) -> jax.Array:
            return logits_function(module, variables)(images).argmax(axis=-1).astype(jnp.int32)

        super().__init__(classes, module, mesh, batch_size)
