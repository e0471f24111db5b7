"""The graph of an exported PyTorch program as plain values: its nodes in order, and the origin of each input."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aft_jax.errors import UserError
from aft_jax.interchange.torch_nodes import Node, Ref, resolve


class Leaf(NamedTuple):
    """An input of the graph that is not the images.

    Attributes:
        kind: 'parameter', 'buffer' or 'constant'.
        key: Key in the state dict, or name of the constant.
    """

    kind: str
    key: str


class Graph(NamedTuple):
    """A program.

    Attributes:
        images: Name of the input.
        image_shape: (C, H, W); None for a size that is not fixed.
        leaves: Origin of each other input by name.
        nodes: Operations that the output depends on, in their order.
        output: Name of the logits.
        shapes: Shape of each tensor in torch; None for a size that is not fixed.
    """

    images: str
    image_shape: tuple[int | None, ...]
    leaves: dict[str, Leaf]
    nodes: tuple[Node, ...]
    output: str
    shapes: dict[str, tuple[int | None, ...]]


def parse(program: Mapping[str, Any], source: str) -> Graph:
    """Parses the JSON of a program.

    Args:
        program: Content of the graph's JSON file.
        source: Name of the model for error messages.

    Raises:
        UserError: If the program does not map one batch of images of any length to logits.
    """
    graph, signature = program['graph_module']['graph'], program['graph_module']['signature']
    leaves, inputs = {}, []
    for spec in signature['input_specs']:
        ((kind, value),) = spec.items()
        match kind:
            case 'parameter' | 'buffer':
                leaves[value['arg']['name']] = Leaf(kind, value[f'{kind}_name'])
            case 'tensor_constant':
                leaves[value['arg']['name']] = Leaf('constant', value['tensor_constant_name'])
            case 'user_input' if 'as_tensor' in value['arg']:
                inputs.append(value['arg']['as_tensor']['name'])
            case _:
                raise UserError(f'{source} has an input that is no tensor ({kind}); it should take images alone.')
    outputs = [spec['user_output']['arg'] for spec in signature['output_specs'] if 'user_output' in spec]
    if len(inputs) != 1 or len(outputs) != 1 or 'as_tensor' not in outputs[0]:
        raise UserError(
            f'{source} maps {len(inputs)} tensors to {len(outputs)}; it should map a batch of images to logits.'
        )
    shapes = {name: _shape(meta) for name, meta in graph['tensor_values'].items()}
    names: dict[str, str] = {}
    nodes = resolve([_node(entry) for entry in graph['nodes']], names, source)
    output = names.get(outputs[0]['as_tensor']['name'], outputs[0]['as_tensor']['name'])
    image_shape = shapes[inputs[0]]
    if len(image_shape) != 4 or len(shapes[output]) != 2:
        raise UserError(
            f'{source} maps a tensor of {len(image_shape)} axes to one of {len(shapes[output])}; it should map images '
            '[B, C, H, W] to logits [B, K].'
        )
    if image_shape[0] is not None:
        raise UserError(
            f'{source} was exported for batches of {image_shape[0]}; export it with a dynamic first axis: '
            'dynamic_shapes=({0: torch.export.Dim("batch", min=2)},).'
        )
    return Graph(inputs[0], image_shape[1:], leaves, _needed(nodes, output), output, shapes)


def _node(entry: Mapping[str, Any]) -> Node:
    """Converts one node of the JSON file."""
    # 'torch.ops.aten.relu_.default', '_operator.mul'
    parts = entry['target'].removeprefix('torch.ops.').split('.')
    operator, overload = parts[1], parts[2] if len(parts) > 2 else ''
    operator = operator if parts[0] in ('aten', '_operator') else '.'.join(parts[:2])
    arguments, options = [], {}
    for argument in entry['inputs']:
        value = _value(argument['arg'])
        if argument.get('kind') == 2:
            options[argument['name']] = value
        else:
            arguments.append(value)
    outputs, is_list = [], len(entry['outputs']) > 1
    for output in entry['outputs']:
        ((kind, value),) = output.items()
        if kind.endswith('s'):
            is_list = True
            outputs += [item['name'] for item in value]
        elif kind != 'as_none':
            outputs.append(value.get('name') or value.get('as_name') or '')
    line = _line(entry.get('metadata', {}).get('stack_trace', ''))
    return Node(operator, overload, tuple(arguments), options, tuple(outputs), is_list, line)


def _value(argument: Mapping[str, Any]) -> Any:
    """Converts an argument of the JSON file to a `Ref`, a plain value or a tuple of them."""
    ((kind, value),) = argument.items()
    match kind:
        case 'as_none':
            return None
        case 'as_tensor':
            return Ref(value['name'])
        case 'as_tensors':
            return tuple(Ref(item['name']) for item in value)
        case 'as_sym_int' | 'as_sym_float' | 'as_sym_bool':
            return _symbol(value)
        case 'as_sym_ints' | 'as_sym_floats':
            return tuple(map(_symbol, value))
        case 'as_optional_tensor':
            return _value(value)
        case 'as_optional_tensors':
            return tuple(map(_value, value))
        case 'as_nested_tensors' | 'as_int_lists':
            raise UserError('the model uses nested lists, which cannot be read.')
    return tuple(value) if isinstance(value, list) else value


def _symbol(value: Mapping[str, Any]) -> Any:
    ((kind, content),) = value.items()
    return Ref(content) if kind == 'as_name' else content


def _needed(nodes: list[Node], output: str) -> tuple[Node, ...]:
    """Selects the nodes that the output depends on."""
    needed, kept = {output}, []
    for node in reversed(nodes):
        if needed.intersection(node.outputs):
            kept.append(node)
            needed.update(node.refs())
    return tuple(reversed(kept))


def _shape(meta: Mapping[str, Any]) -> tuple[int | None, ...]:
    return tuple(size.get('as_int') for size in meta['sizes'])


def _line(trace: str) -> str:
    """Finds the last line outside of torch in a stack trace."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*(?:\n +([^\n]*))?', trace)
    own = [frame for frame in frames if '/torch/' not in frame[0]] or frames
    if not own:
        return ''
    path, number, text = own[-1]
    return f'{Path(path).name}, line {number}: {text.strip()}'
