"""A PyTorch program and its weights as a value, and the places of the weights among Flax's variables."""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from aft_jax.errors import UserError
from aft_jax.interchange.program_file import ProgramFile
from aft_jax.interchange.torch_features import Features, find_features
from aft_jax.interchange.torch_graph import Leaf, parse
from aft_jax.interchange.torch_layers import NAMES, find_layers
from aft_jax.interchange.torch_operators import OPERATORS
from aft_jax.interchange.torch_operators.pooling import pair

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
                    f'{self.source} uses the operator {node.operator}{where}, which cannot be carried out here; '
                    'replace it in the model, or ask for it.'
                )

    def _places(self) -> dict[str, tuple[str, ...]]:
        places: dict[str, tuple[str, ...]] = {}
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
