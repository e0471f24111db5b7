"""Finds the last feature maps of a PyTorch program: what its pooling, or its first flattened layer, reads.

The way back begins at the logits and follows the first input of each operator that comes from the images.
"""

from typing import Any, NamedTuple

import jax

from aft_jax.interchange.torch_graph import Graph, Node
from aft_jax.interchange.torch_operators.values import Maps, maps

POOLS = frozenset(('adaptive_avg_pool2d', 'adaptive_max_pool2d', 'mean', 'amax', 'sum'))
WINDOWS = frozenset(('avg_pool2d', 'max_pool2d'))
TOKENS = frozenset(('select', 'slice'))
FLATTENINGS = frozenset(('flatten', 'view', 'reshape'))


class Features(NamedTuple):
    """Place of the last feature maps.

    Attributes:
        name: Name of the value in the graph.
        channels_last: Whether its axes are [B, H, W, C] in torch.
        dense: Name of the output of the first dense layer after the maps; '' if there is none.
    """

    name: str
    channels_last: bool
    dense: str


def find_features(graph: Graph) -> Features | None:
    """Finds the last feature maps, or returns None if the way from the logits reaches none."""
    makers = {name: node for node in graph.nodes for name in node.outputs}
    depends = _depends_on_images(graph)
    name, dense, candidate = graph.output, '', None
    while name in makers:
        node = makers[name]
        source = next((ref for ref in node.refs() if ref in depends), '')
        before, after = graph.shapes.get(source, ()), graph.shapes[name]
        if node.operator == 'linear':
            dense = name
        elif node.operator == 'conv2d':
            if not dense and after[1] == graph.shapes[graph.output][1]:  # the head
                return Features(source, False, '')
            if before[2:] != (1, 1):
                return candidate or Features(name, False, dense)
        elif len(before) in (3, 4) and _ends_maps(node, before, after):
            candidate = Features(source, _channels_last(node, len(before)), dense)
            if dense and not (node.operator in FLATTENINGS and before[2:] == (1, 1)):
                return candidate
        name = source
    return candidate


def _depends_on_images(graph: Graph) -> set[str]:
    """Lists the tensors that are computed from the images."""
    depends = {graph.images}
    for node in graph.nodes:
        if depends.intersection(node.refs()):
            depends.update(name for name in node.outputs if name in graph.shapes)
    return depends


def _ends_maps(node: Node, before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Checks whether a node turns feature maps or tokens into something with fewer positions."""
    if node.operator in POOLS:
        return True
    if node.operator in WINDOWS:
        return after[2:] == (1, 1)
    if node.operator in TOKENS:
        return len(after) < len(before)
    return node.operator in FLATTENINGS and len(after) == 2


def _channels_last(node: Node, ndim: int) -> bool:
    """Returns whether the maps that a node reads have their channels last."""
    if ndim == 3:
        return True
    dims = node.arguments[1] if node.operator in ('mean', 'amax', 'sum') and len(node.arguments) > 1 else (2, 3)
    dims = (dims,) if isinstance(dims, int) else dims
    return {dim % ndim for dim in dims} == {1, 2}


def as_maps(value: Any, channels_last: bool) -> jax.Array:
    """Converts a value to feature maps [B, H, W, C]. Tokens [B, N, C] become maps [B, N, 1, C]."""
    if isinstance(value, Maps) or (value.ndim == 4 and not channels_last):
        return maps(value)
    return value[:, :, None, :] if value.ndim == 3 else value
