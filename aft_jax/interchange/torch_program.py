"""A PyTorch program (`torch.export`) as a classifier in Flax: its graph is carried out operator by operator in JAX.

    file = program_file.read(Path('model.pt2'))
    module = TorchProgram(program=Program(file))
    logits = module.apply(to_variables(module.program, file.tensors), images)

torch is not needed. The program was exported in evaluation mode. BatchNorm and dropout are single operators in it, so
training mode is chosen by the caller here, as for every other classifier.
"""

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from aft_jax.errors import UserError
from aft_jax.interchange.program_file import ProgramFile
from aft_jax.interchange.torch_features import Features, as_maps, find_features
from aft_jax.interchange.torch_graph import Leaf, Node, Ref, parse
from aft_jax.interchange.torch_layers import NAMES, Layer, apply_layer, find_layers, make_layer
from aft_jax.interchange.torch_operators import OPERATORS, Maps
from aft_jax.interchange.torch_operators.pooling import pair
from aft_jax.interchange.torch_operators.values import plain
from aft_jax.models.classifier import Classifier
from aft_jax.models.layers import normalise

DROPOUTS = ('dropout', 'feature_dropout')
COUNTER = 'num_batches_tracked'


class Program:
    """A program and its weights, as a value: two programs with the same file content are equal.

    Attributes:
        file: Content of the file.
        graph: Graph.
        layers: Layer of each node that is one, by the name of the node's output.
        features: Place of the last feature maps; None if there are none.
        places: Path in Flax of each tensor of the state dict that the graph trains or updates.
    """

    def __init__(self, file: ProgramFile, source: str = '') -> None:
        """Parses the graph of a file; `source` is its name in error messages.

        Raises:
            UserError: If the graph does not classify images, or uses an operator that is missing here.
        """
        self.file, self.source = file, source or str(file.path)
        self.graph = parse(file.graph, self.source)
        self._check_operators()
        self.layers = find_layers(self.graph, {key: tensor.shape for key, tensor in file.tensors.items()})
        self.features: Features | None = find_features(self.graph)
        self.places = self._places()
        self._digest = digest(file)

    def __eq__(self, other: object) -> bool:
        """Compares the content."""
        return isinstance(other, Program) and self._digest == other._digest

    def __hash__(self) -> int:
        """Hashes the content."""
        return hash(self._digest)

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return int(self.graph.shapes[self.graph.output][1] or 0)

    @cached_property
    def fast_in_loops(self) -> bool:
        """Whether all convolutions are plain ones, whose gradients are fast in a loop on a CPU."""
        convolutions = (node.arguments[5:7] for node in self.graph.nodes if node.operator == 'conv2d')
        return all(set(pair(dilation[0] if dilation else 1)) | set(dilation[1:]) == {1} for dilation in convolutions)

    def constant(self, leaf: Leaf) -> np.ndarray:
        """Returns the value of an input of the graph; 64-bit numbers become 32-bit numbers."""
        value = self.file.constants[leaf.key] if leaf.key in self.file.constants else self.file.tensors[leaf.key]
        return value.astype({'int64': 'int32', 'float64': 'float32'}.get(str(value.dtype), value.dtype))

    def _check_operators(self) -> None:
        for node in self.graph.nodes:
            if node.operator not in OPERATORS and node.operator not in (*DROPOUTS, 'batch_norm'):
                where = f' (in {node.line})' if node.line else ''
                raise UserError(
                    f'{self.source} uses the operator {node.operator}{where}, which cannot be carried out here; replace '
                    'it in the model, or ask for it.'
                )

    def _places(self) -> dict[str, tuple[str, ...]]:
        places = {}
        for layer in self.layers.values():
            for role, key in layer.keys.items():
                collection, name = NAMES[layer.operator][role]
                places[key] = (collection, layer.name, name)
        for leaf in self.graph.leaves.values():
            floating = leaf.kind != 'constant' and np.issubdtype(self.constant(leaf).dtype, np.floating)
            if floating and leaf.key not in places and leaf.key in self.file.tensors:
                places[leaf.key] = ('params' if leaf.kind == 'parameter' else 'batch_stats', leaf.key)
        used = {ref for node in self.graph.nodes for ref in node.refs()}
        read = {leaf.key for name, leaf in self.graph.leaves.items() if name in used}
        return {key: place for key, place in places.items() if key in read or key.endswith(COUNTER)}


def digest(file: ProgramFile) -> str:
    """Computes the SHA-256 of the graph and the tensors of a program."""
    hasher = hashlib.sha256()
    for name in sorted(file.entries):
        if '/models/' in f'/{name}' or '/data/weights/' in f'/{name}' or '/data/constants/' in f'/{name}':
            hasher.update(name.encode())
            hasher.update(file.entries[name])
    return hasher.hexdigest()


def to_flax(tensor: np.ndarray, place: tuple[str, ...]) -> np.ndarray:
    """Converts a tensor of torch to the layout of its place in Flax, float32."""
    value = tensor.astype(np.float32)
    if place[-1] == 'kernel' and len(place) == 3:
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return np.array(value, order='C')


def to_torch(array: Any, place: tuple[str, ...]) -> np.ndarray:
    """Converts a variable to torch's layout: the inverse of `to_flax`."""
    value = np.asarray(array)
    if place[-1] == 'kernel' and len(place) == 3:
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return np.array(value, order='C')


def to_variables(program: Program, tensors: Mapping[str, np.ndarray]) -> dict:
    """Converts the tensors of a state dict to variables {'params', 'batch_stats'}, float32.

    Args:
        program: Program.
        tensors: Tensors by the keys of the program's state dict.
    """
    leaves = {place: to_flax(tensors[key], place) for key, place in program.places.items()}
    return {'params': {}, 'batch_stats': {}} | unflatten_dict(leaves)


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
                    f'{program.source}: {node.line or node.operator} uses {node.operator} in a way that cannot be carried '
                    f'out here ({reason}).'
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
