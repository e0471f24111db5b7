"""A PyTorch program (`torch.export`) as a classifier in Flax: its graph is carried out operator by operator in JAX.

    file = program_file.read(Path('model.pt2'))
    module = TorchProgram(program=Program(file))
    logits = module.apply(to_variables(module.program, file.tensors), images)

torch is not needed. The program was exported in evaluation mode. BatchNorm and dropout are single operators in it, so
training mode is chosen by the caller here, as for every other classifier.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aft_jax.errors import UserError
from aft_jax.interchange.program import DROPOUTS, Program, to_flax, to_variables
from aft_jax.interchange.torch_features import Features, as_maps
from aft_jax.interchange.torch_graph import Leaf
from aft_jax.interchange.torch_layers import Layer, apply_layer, make_layer
from aft_jax.interchange.torch_nodes import Node, Ref
from aft_jax.interchange.torch_operators import OPERATORS, Maps
from aft_jax.interchange.torch_operators.values import plain
from aft_jax.models.classifier import Classifier
from aft_jax.models.layers import normalise


class TorchProgram(Classifier):
    """A PyTorch program as a classifier.

    Its last feature maps are what its global pooling reads, see `torch_features`. Tokens [B, N, C] count as maps of
    N x 1 positions.

    Attributes:
        program: Program.
    """

    num_classes: int = 0
    program: Any = None

    @property
    def fast_in_loops(self) -> bool:  # type: ignore[override]
        """Whether the gradients are fast in a loop on a CPU."""
        return self.program.fast_in_loops

    @property
    def has_features(self) -> bool:
        """Whether the module can return its last feature maps."""
        return self.program.features is not None

    @property
    def layer_after_maps(self) -> str:
        """Name of the dense layer that reads one number for each channel of the last feature maps; '' if none does."""
        features: Features | None = self.program.features
        layer = self.program.layers.get(features.dense) if features else None
        if layer is None:
            return ''
        assert features is not None
        shape = self.program.graph.shapes[features.name]
        channels = shape[-1] if features.channels_last else shape[1]
        return layer.name if self.program.file.tensors[layer.keys['weight']].shape[1] == channels else ''

    def initial_variables(self) -> dict:
        """Returns the weights that the file of the program holds."""
        return jax.tree.map(jnp.asarray, to_variables(self.program, self.program.file.tensors))

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, features: bool = False):
        """Computes the logits of a batch; arguments and results are those of `Classifier`."""
        program: Program = self.program
        graph = program.graph
        values: dict[str, Any] = {graph.images: Maps(normalise(images, self.mean, self.std, self.dtype))}
        in_layers = {key for layer in program.layers.values() for key in layer.keys.values()}
        used = {ref for node in graph.nodes for ref in node.refs()}
        for name, leaf in graph.leaves.items():
            if name in used and leaf.key not in in_layers:
                values[name] = self._leaf(leaf)
        modules: dict[str, nn.Module] = {}
        for node in graph.nodes:
            try:
                result = self._carry_out(node, values, modules, train)
            except (TypeError, ValueError, NotImplementedError, KeyError, IndexError) as error:
                reason = ' '.join(str(error).split())[:200]
                raise UserError(
                    f'{program.source}: {node.line or node.operator} uses {node.operator} in a way that cannot be '
                    f'carried out here ({reason}).'
                ) from error
            if node.is_list:
                values.update(zip(node.outputs, result, strict=False))
            else:
                values[node.outputs[0]] = result
        logits = plain(values[graph.output]).astype(jnp.float32)
        if not features:
            return logits
        place = program.features
        return logits, (as_maps(values[place.name], place.channels_last),) if place else ()

    def _carry_out(self, node: Node, values: Mapping[str, Any], modules: dict[str, nn.Module], train: bool) -> Any:
        """Applies the operator of a node to the values that it reads."""
        layer = self.program.layers.get(node.outputs[0])
        if layer is not None:
            if layer.name not in modules:
                initial = _initial(self.program, layer)
                modules[layer.name] = make_layer(layer, node, initial, train, self.dtype)
            (x,) = _read(node.arguments[:1], values)
            return apply_layer(modules[layer.name], x, self.dtype)
        arguments = _read(node.arguments, values)
        if node.operator in DROPOUTS:
            return self._drop(node, arguments[0], float(arguments[1]), train)
        if node.operator == 'batch_norm':
            raise NotImplementedError('BatchNorm without running statistics, or with shared ones')
        options = {name: _read(value, values) for name, value in node.options.items()}
        return OPERATORS[node.operator](*arguments, **options)

    def _drop(self, node: Node, x: Any, rate: float, train: bool) -> Any:
        """Applies dropout to each element, or to each channel of each image."""
        array = x.array if isinstance(x, Maps) else x
        dims: Iterable[int] = ()
        if node.operator == 'feature_dropout':
            dims = (1, 2) if isinstance(x, Maps) else range(2, array.ndim)
        dropped = nn.Dropout(rate, tuple(dims), deterministic=not train, name=node.outputs[0])(array)
        return Maps(dropped) if isinstance(x, Maps) else dropped

    def _leaf(self, leaf: Leaf) -> jax.Array:
        """Reads a parameter, a statistic or a constant that belongs to no layer."""
        value = self.program.constant(leaf)
        place = self.program.places.get(leaf.key)
        if place is None:
            array = jnp.asarray(value)
        elif place[0] == 'params':
            array = self.param(leaf.key, lambda _: jnp.asarray(value))
        else:
            array = self.variable('batch_stats', leaf.key, lambda: jnp.asarray(value)).value
        return array.astype(self.dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _initial(program: Program, layer: Layer):
    """Builds the function that returns the names and initial values of a layer's variables."""

    def initial() -> list[tuple[str, np.ndarray]]:
        places = {key: program.places[key] for key in layer.keys.values()}
        return [(place[-1], to_flax(program.file.tensors[key], place)) for key, place in places.items()]

    return initial


def _read(value: Any, values: Mapping[str, Any]) -> Any:
    """Replaces references by the values that they name."""
    match value:
        case Ref(name):
            return values[name]
        case tuple():
            return tuple(_read(item, values) for item in value)
    return value
