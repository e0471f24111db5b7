"""BatchNorm statistics of a model on given images, for parameters that were never trained as they are.

A point between two trained models has the statistics of neither. One pass in training mode measures them: each layer's
input, as batch statistics make it, pooled over all images,

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
from aft_jax.training.prediction import parts

# By layer: the mean and the mean square of its input, float32 [C].
Moments = dict[tuple[str, ...], tuple[jax.Array, jax.Array]]


def moments(module: nn.Module, variables: dict, images: jax.Array, count: jax.Array) -> Moments:
    """Returns what the inputs of every BatchNorm are like when batch statistics normalise the images; no dropout.

    Args:
        module: The classifier.
        variables: Its parameters; the statistics among them are of no consequence.
        images: float32 [B, H, W, C] in [0, 1].
        count: int32 scalar; the first `count` images count, the others are padding.
    """
    found: Moments = {}

    def watch(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        match context.module:
            case nn.Dropout():
                return args[0]
            case nn.BatchNorm() if context.method_name == '__call__':
                (x,) = args
                counts = (jnp.arange(len(x)) < count).reshape(-1, *[1] * (x.ndim - 1))
                axes = tuple(range(x.ndim - 1))
                wide = x.astype(jnp.float32)
                found[context.module.path] = (wide.mean(axes, where=counts), jnp.square(wide).mean(axes, where=counts))
                return call(x, **kwargs, mask=counts)
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        module.apply(variables, images, train=True, mutable=['batch_stats'])
    return found


class Statistics:
    """Measures the BatchNorm statistics of models of one architecture."""

    def __init__(self, module: nn.Module, mesh: Mesh, batch_size: int):
        """Measures batch by batch; `batch_size` is rounded up to a multiple of the devices."""
        self._mesh, self._batch_size = mesh, batch_size
        whole = replicated(mesh)

        def call(variables, images, count):
            return moments(module, variables, images.astype(jnp.float32) / 255.0, count)

        self._call = jax.jit(
            call,
            in_shardings=(whole, batch_sharding(mesh, 0), whole),
            out_shardings=whole,
            compiler_options=compiler_options(module),
        )

    def __call__(self, variables: dict, images: np.ndarray) -> dict:
        """Returns the variables with the statistics, float32, that uint8 images [N, H, W, C] give them."""
        there = replicate(self._mesh, variables)
        found, counts = [], []
        for part, count in parts(self._mesh, images, self._batch_size):
            found.append(wait_on_virtual_devices(self._mesh, self._call(there, part, np.int32(count))))
            counts.append(count)
        statistics = flatten_dict(variables['batch_stats'])
        for path in found[0]:
            means, squares = (
                np.average([np.asarray(part[path][i], np.float64) for part in found], axis=0, weights=counts)
                for i in range(2)
            )
            statistics[*path, 'mean'] = means.astype(np.float32)
            statistics[*path, 'var'] = np.maximum(squares - means**2, 0).astype(np.float32)
        return variables | {'batch_stats': unflatten_dict(statistics)}
