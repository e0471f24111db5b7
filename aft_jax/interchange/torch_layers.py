"""The layers of a PyTorch program as Flax modules, with Flax's names and layouts of weights.

So a defense finds the dense layers, the BatchNorms and the dropout of a program as it finds those of our own networks.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aft_jax.interchange.torch_graph import Graph
from aft_jax.interchange.torch_nodes import Node, Ref
from aft_jax.interchange.torch_operators.layers import convolve
from aft_jax.interchange.torch_operators.values import Maps, maps, plain
from aft_jax.ops.batch_norm import BatchNorm, moments, normalised, normalised_by_batch

# Positions of the weights among the arguments of the operators.
POSITIONS = {
    'conv2d': {1: 'weight', 2: 'bias'},
    'linear': {1: 'weight', 2: 'bias'},
    'batch_norm': {1: 'weight', 2: 'bias', 3: 'running_mean', 4: 'running_var'},
}
# Weight in torch -> (collection, name in Flax).
NAMES = {
    'conv2d': {'weight': ('params', 'kernel'), 'bias': ('params', 'bias')},
    'linear': {'weight': ('params', 'kernel'), 'bias': ('params', 'bias')},
    'batch_norm': {
        'weight': ('params', 'scale'),
        'bias': ('params', 'bias'),
        'running_mean': ('batch_stats', 'mean'),
        'running_var': ('batch_stats', 'var'),
        'num_batches_tracked': ('batch_stats', 'count'),
    },
}

# Function that returns the names and initial values of a layer's variables.
Initial = Callable[[], Iterable[tuple[str, np.ndarray]]]


class Layer(NamedTuple):
    """A layer of a program.

    Attributes:
        operator: 'conv2d', 'linear' or 'batch_norm'.
        name: Name of the module in torch, such as 'layer1.0.conv1', which is also its name in Flax.
        keys: Keys of its tensors in the state dict, by their names in the layer.
    """

    operator: str
    name: str
    keys: dict[str, str]


def find_layers(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Layer]:
    """Finds the layers of a graph.

    A layer is an operator whose weights are the tensors of one module in torch, under their usual names. No other kind
    of operator may read them.

    Args:
        graph: Graph.
        shapes: Shapes of the tensors of the state dict.

    Returns:
        The layer of each node, by the name of the node's output.
    """
    users: dict[str, list[tuple[str, str]]] = {}
    candidates: dict[str, Layer] = {}
    for node in graph.nodes:
        roles = POSITIONS.get(node.operator, {})
        keys = {}
        for position, value in enumerate(node.arguments):
            if isinstance(value, Ref) and value.name in graph.leaves:
                key = graph.leaves[value.name].key
                users.setdefault(key, []).append((node.operator, roles.get(position, '')))
                if position in roles:
                    keys[roles[position]] = key
        for value in node.options.values():
            if isinstance(value, Ref) and value.name in graph.leaves:
                users.setdefault(graph.leaves[value.name].key, []).append((node.operator, ''))
        layer = _layer(node, keys, shapes)
        if layer:
            candidates[node.outputs[0]] = layer
    return {
        output: layer
        for output, layer in candidates.items()
        if all(user == (layer.operator, role) for role, key in layer.keys.items() for user in users.get(key, []))
    }


def _layer(node: Node, keys: dict[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
    """Returns the layer of a node whose weights have the usual names of one module, else None."""
    prefixes = {key.removesuffix(f'.{role}') for role, key in keys.items() if key.endswith(f'.{role}')}
    tensors = [value for value in node.arguments[1:5] if isinstance(value, Ref)]
    complete = len(keys) == len(tensors) and all(key.endswith(f'.{role}') for role, key in keys.items())
    required = 'running_mean' if node.operator == 'batch_norm' else 'weight'
    if len(prefixes) != 1 or not complete or required not in keys:
        return None
    (name,) = prefixes
    counter = f'{name}.num_batches_tracked'
    if node.operator == 'batch_norm' and counter in shapes:
        keys = keys | {'num_batches_tracked': counter}
    return Layer(node.operator, name, keys)


class TorchConv(nn.Module):
    """A convolution of feature maps.

    Attributes:
        initial: Initial values of 'kernel' [h, w, C / groups, C'] and, if the layer has one, 'bias' [C'].
        arguments: Stride, padding, dilation and groups, as far as they are given.
        dtype: Dtype of the computation.
    """

    initial: Initial
    arguments: tuple[Any, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves maps [B, H, W, C]."""
        weights = {name: self.param(name, initialiser(value)).astype(self.dtype) for name, value in self.initial()}
        y = convolve(x.astype(self.dtype), weights['kernel'], *self.arguments)
        return y + weights['bias'][None, None, None, :] if 'bias' in weights else y


class TorchBatchNorm(BatchNorm):
    """BatchNorm with torch's rule for the running statistics, in which the variance is the unbiased estimate.

    Attributes:
        initial: Initial values of 'mean', 'var', and of 'scale', 'bias' and 'count' (of batches) if the layer has them.
        cumulative: Whether the running statistics are the averages over all batches, torch's momentum None.
    """

    initial: Initial = tuple
    cumulative: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None):
        """Normalises over all axes but the last; the arguments are those of `BatchNorm`."""
        average = nn.merge_param('use_running_average', self.use_running_average, use_running_average)
        initial = dict(self.initial())
        running = {
            name: self.variable('batch_stats', name, initialiser(initial[name]), None)
            for name in ('mean', 'var', 'count')
            if name in initial
        }
        neutral = {'scale': jnp.ones, 'bias': jnp.zeros}
        scale, bias = (
            self.param(name, initialiser(initial[name])) if name in initial else neutral[name](x.shape[-1], jnp.float32)
            for name in neutral
        )
        if average:
            return normalised(x, running['mean'].value, running['var'].value, scale, bias, self.epsilon)
        if mask is None:
            y, mean, var = normalised_by_batch(x, scale, bias, self.epsilon)
        else:
            mean, var = moments(x, mask)
            y = normalised(x, mean, var, scale, bias, self.epsilon)
        if not self.is_initializing():
            number = x.size // x.shape[-1]
            share: float | jax.Array = 1 - self.momentum
            if 'count' in running:
                running['count'].value = running['count'].value + 1
                share = 1 / running['count'].value if self.cumulative else share
            unbiased = var * (number / max(number - 1, 1))
            running['mean'].value = (1 - share) * running['mean'].value + share * mean
            running['var'].value = (1 - share) * running['var'].value + share * unbiased
        return y


def initialiser(value: np.ndarray) -> Callable[[Any], jax.Array]:
    """Builds the initialiser of Flax that returns a value."""
    return lambda _: jnp.asarray(value)


def make_layer(layer: Layer, node: Node, initial: Initial, train: bool, dtype: Any) -> nn.Module:
    """Builds the Flax module of a layer.

    Args:
        layer: Layer.
        node: Node of the layer.
        initial: Function that returns the names and initial values of the layer's variables.
        train: Whether BatchNorm uses the statistics of the batch.
        dtype: Dtype of the computation.
    """
    match layer.operator:
        case 'conv2d':
            return TorchConv(initial, node.arguments[3:], dtype, name=layer.name)
        case 'linear':
            values = dict(initial())
            kernel = values['kernel']
            return nn.Dense(
                kernel.shape[1],
                use_bias='bias' in values,
                dtype=dtype,
                kernel_init=lambda *_: jnp.asarray(kernel),
                bias_init=lambda *_: jnp.asarray(values['bias']),
                name=layer.name,
            )
    momentum, epsilon = node.arguments[6:8]
    return TorchBatchNorm(
        use_running_average=not train,
        momentum=1 - (momentum or 0.0),
        epsilon=epsilon,
        initial=initial,
        # A program in evaluation mode has 0 in place of torch's None.
        cumulative=not momentum,
        name=layer.name,
    )


def apply_layer(module: nn.Module, x: Any, dtype: Any) -> Any:
    """Applies the module of a layer to feature maps, or to an array with torch's axes."""
    match module:
        case TorchConv():
            return Maps(module(maps(x)))
        case TorchBatchNorm():
            array = x.array if isinstance(x, Maps) else jnp.moveaxis(x, 1, -1)
            y = module(array.astype(jnp.float32)).astype(dtype)
            return Maps(y) if isinstance(x, Maps) else jnp.moveaxis(y, -1, 1)
    return module(plain(x))
