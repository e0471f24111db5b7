"""BatchNorm statistics of a model on given images, for parameters that did not come out of a training directly.

A point between two trained models has the statistics of neither. One pass in training mode measures them. Batch
statistics normalise the activations, and each layer's inputs are pooled over all images:

    mean = E[x],     var = E[x^2] - E[x]^2.

Source: Izmailov et al., "Averaging Weights Leads to Wider Optima" (2018), section 3.2.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from aft_jax.models.cpu_compilation import compiler_options
from aft_jax.runtime.sharding import batch_sharding, replicate, replicated, wait_on_virtual_devices
from aft_jax.training.prediction import float_images, sharded_batches

# Path of a layer -> mean and mean square of its input, float32 [C].
Moments = dict[tuple[str, ...], tuple[jax.Array, jax.Array]]


def moments(module: nn.Module, variables: dict, images: jax.Array, count: jax.Array) -> Moments:
    """Measures the inputs of every BatchNorm of one batch, in training mode without dropout.

    Args:
        module: Classifier.
        variables: Variables of the classifier; its running statistics have no influence.
        images: float32 [B, H, W, C] in [0, 1].
        count: int32 scalar, number of images; those after the first `count` are padding.
    """
    measured: Moments = {}

    def intercept(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        match context.module:
            case nn.Dropout():
                return args[0]
            case nn.BatchNorm() if context.method_name == '__call__':
                (x,) = args
                counts = (jnp.arange(len(x)) < count).reshape(-1, *[1] * (x.ndim - 1))
                axes = tuple(range(x.ndim - 1))
                wide = x.astype(jnp.float32)
                means = wide.mean(axes, where=counts), jnp.square(wide).mean(axes, where=counts)
                measured[context.module.path] = means
                return call(x, **kwargs, mask=counts)
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        module.apply(variables, images, train=True, mutable=['batch_stats'])
    return measured


def first_layer(module: nn.Module, variables: dict, image_shape: tuple[int, ...]) -> tuple[str, ...] | None:
    """Finds the path of the BatchNorm layer that is called first; None if there is none.

    Args:
        module: Classifier.
        variables: Its variables.
        image_shape: (H, W, C).
    """
    paths: list[tuple[str, ...]] = []

    def intercept(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if isinstance(context.module, nn.BatchNorm) and context.method_name == '__call__':
            paths.append(context.module.path)
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        jax.eval_shape(module.apply, variables, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return paths[0] if paths else None


class Statistics:
    """Measures the BatchNorm statistics of models of one architecture."""

    def __init__(self, module: nn.Module, mesh: Mesh, batch_size: int):
        """Prepares measurements batch by batch; `batch_size` is rounded up to a multiple of the devices."""
        self._mesh, self._batch_size = mesh, batch_size
        whole = replicated(mesh)

        def call(variables, images, count):
            return moments(module, variables, float_images(images), count)

        self._call = jax.jit(
            call,
            in_shardings=(whole, batch_sharding(mesh, 0), whole),
            out_shardings=whole,
            compiler_options=compiler_options(module),
        )

    def __call__(self, variables: dict, images: np.ndarray) -> dict:
        """Replaces the statistics in a model's variables by those of the images.

        Args:
            variables: Variables of the model.
            images: uint8, or float32 in [0, 1], [N, H, W, C].
        """
        on_device = replicate(self._mesh, variables)
        measured, counts = [], []
        for batch, count in sharded_batches(self._mesh, images, self._batch_size):
            measured.append(wait_on_virtual_devices(self._mesh, self._call(on_device, batch, np.int32(count))))
            counts.append(count)
        statistics = flatten_dict(variables['batch_stats'])
        for path in measured[0]:
            means, squares = (
                np.average([np.asarray(part[path][i], np.float64) for part in measured], axis=0, weights=counts)
                for i in range(2)
            )
            statistics[*path, 'mean'] = means.astype(np.float32)
            statistics[*path, 'var'] = np.maximum(squares - means**2, 0).astype(np.float32)
        return variables | {'batch_stats': unflatten_dict(statistics)}
