"""Which convolution or dense layer feeds which BatchNorm, found by data flow.

The order of layers in a module does not tell: a pre-activation block has its first BatchNorm before its first
convolution, and its shortcut anywhere. Here the network is cut at every layer. Each layer returns a constant, and one
constant at a time is NaN. A BatchNorm whose input becomes NaN reads that layer, perhaps through an activation or a
pooling, and through no other layer.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

LayerPath = tuple[str, ...]
LAYERS = (nn.Conv, nn.ConvTranspose, nn.Dense, nn.BatchNorm)


class NormPair(NamedTuple):
    """A BatchNorm and the only layer that it reads.

    Attributes:
        layer: Path of the convolution or dense layer among the parameters.
        norm: Path of the BatchNorm.
        epsilon: Constant that the BatchNorm adds to the variance.
    """

    layer: LayerPath
    norm: LayerPath
    epsilon: float


def find_pairs(module: nn.Module, variables: Any, image_shape: tuple[int, ...]) -> list[NormPair]:
    """Pairs every BatchNorm that reads a single convolution or dense layer with that layer, in the order of the calls.

    A BatchNorm that reads a sum of layers, as after a residual block, belongs to no pair.

    Args:
        module: Classifier.
        variables: Variables of the classifier. Their values do not matter.
        image_shape: (H, W, C).
    """
    layers: list[LayerPath] = []
    norms: dict[LayerPath, float] = {}

    def inputs_of_norms(marks: jax.Array | None) -> dict[LayerPath, jax.Array]:
        """Sums the inputs of each BatchNorm in the cut network, whose layers return marks [number of layers]."""
        sums: dict[LayerPath, jax.Array] = {}

        def intercept(call, arguments, options, context):
            output = call(*arguments, **options)
            layer, path = context.module, context.module.path
            if not isinstance(layer, LAYERS) or context.method_name != '__call__':
                return output
            if isinstance(layer, nn.BatchNorm):
                total = jnp.sum(arguments[0].astype(jnp.float32))
                sums[path] = sums[path] + total if path in sums else total
            if marks is None:
                layers.extend([path] if path not in layers else [])
                norms.update({path: layer.epsilon} if isinstance(layer, nn.BatchNorm) else {})
                return output
            return jnp.full_like(output, marks[layers.index(path)].astype(output.dtype))

        with nn.intercept_methods(intercept):
            module.apply(variables, jnp.ones((1, *image_shape), jnp.float32))
        return sums

    jax.eval_shape(lambda: inputs_of_norms(None))
    if not norms:
        return []
    marks = jnp.where(jnp.eye(len(layers), dtype=bool), jnp.nan, 1.0)
    sums = jax.jit(lambda marks: jax.lax.map(inputs_of_norms, marks))(marks)
    pairs = []
    for norm, epsilon in norms.items():
        read = [layers[i] for i in np.flatnonzero(np.isnan(sums[norm]))]
        if len(read) == 1 and read[0] not in norms:
            pairs.append(NormPair(read[0], norm, epsilon))
    return pairs
