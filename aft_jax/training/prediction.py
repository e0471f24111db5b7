"""Applies functions of a model to any number of images: one compiled, sharded call for each batch.

Images are uint8 as they are stored, or float32 in [0, 1] (adversarial examples, which rounding would change). The
compiled function divides uint8 images by 255.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aft_jax.models import logits_function
from aft_jax.models.cpu_compilation import compiler_options
from aft_jax.runtime.sharding import batch_sharding, replicate, replicated, wait_on_virtual_devices

Array = TypeVar('Array', np.ndarray, jax.Array)
# (variables, float32 images [B, H, W, C] in [0, 1], *rows [B, ...]) -> pytree of arrays [B, ...]
ImageFunction = Callable[..., Any]


def float_images(images: Array) -> Array:
    """Converts uint8 images, of NumPy or JAX, to float32 in [0, 1]. Leaves float32 images as they are."""
    return images.astype(jnp.float32) / 255.0 if images.dtype == jnp.uint8 else images


def sharded_batches(mesh: Mesh, array: np.ndarray, batch_size: int) -> Iterator[tuple[jax.Array, int]]:
    """Yields batches of an array [N, ...], each split among the devices, with its number of rows without padding.

    Args:
        mesh: Devices.
        array: Array of any dtype.
        batch_size: Rows of a batch, rounded up to a multiple of the devices. Zeros fill up the last batch.
    """
    size = -(-batch_size // mesh.size) * mesh.size
    for first in range(0, len(array), size):
        rows = array[first : first + size]
        padded = np.concatenate([rows, np.zeros((size - len(rows), *array.shape[1:]), array.dtype)])
        yield jax.make_array_from_callback(padded.shape, batch_sharding(mesh, 0), padded.__getitem__), len(rows)


class BatchedFunction:
    """Function of (variables, images) that takes any number of images and is computed batch by batch."""

    def __init__(self, function: ImageFunction, module: nn.Module, mesh: Mesh, batch_size: int):
        """Prepares a function. It is compiled at the first call.

        Args:
            function: Function of one batch.
            module: Network that does most of the function's work; it decides the options of the compiler.
            mesh: Devices.
            batch_size: Images in one call, rounded up to a multiple of the devices.
        """
        self._mesh, self._batch_size = mesh, batch_size
        whole, cut = replicated(mesh), batch_sharding(mesh, 0)

        def call(variables, images, rows):
            return function(variables, float_images(images), *rows)

        self._call: Callable = jax.jit(
            call, in_shardings=(whole, cut, cut), out_shardings=whole, compiler_options=compiler_options(module)
        )

    def __call__(self, variables: Any, images: np.ndarray, *rows: np.ndarray) -> Any:
        """Computes the function of all images.

        Args:
            variables: Dict of arrays that every batch sees whole, such as a model's variables.
            images: uint8, or float32 in [0, 1], [N, H, W, C], N at least 1.
            *rows: Further arrays [N, ...], one row for each image, such as labels.

        Returns:
            Pytree of NumPy arrays [N, ...].
        """
        variables = replicate(self._mesh, {name: variables[name] for name in variables})
        results = []
        for batch in zip(*(sharded_batches(self._mesh, x, self._batch_size) for x in (images, *rows)), strict=True):
            (on_device, count), *others = batch
            result = self._call(variables, on_device, tuple(row for row, _ in others))
            results.append((wait_on_virtual_devices(self._mesh, result), count))
        unpadded = [jax.tree.map(lambda x, n=count: np.asarray(x)[:n], result) for result, count in results]
        return jax.tree.map(lambda *results: np.concatenate(results), *unpadded)


class Predictor(BatchedFunction):
    """Predicts the classes, int32 [N], of images, the model in evaluation mode."""

    def __init__(self, module: nn.Module, mesh: Mesh, batch_size: int):
        """Prepares predictions by `module`; arguments as of `BatchedFunction`."""

        def classes(variables: Any, images: jax.Array) -> jax.Array:
            return logits_function(module, variables)(images).argmax(axis=-1).astype(jnp.int32)

        super().__init__(classes, module, mesh, batch_size)
