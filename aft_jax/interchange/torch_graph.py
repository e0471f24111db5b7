"""The graph of an exported PyTorch program as plain values: nodes in their order, and where each input comes from.

In-place operators are resolved here: later nodes read the result of `relu_` where they read its input in torch. A graph in which that would
differ from torch, because a view of the same memory is read later, is refused.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aft_jax.errors import UserError

# Operators whose result shares the memory of their first input.
VIEWS = frozenset(
    'alias as_strided chunk contiguous detach expand expand_as flatten getitem movedim narrow permute reshape select '
    'slice split split_with_sizes squeeze swapaxes t to transpose type_as unbind unflatten unsqueeze view view_as'.split()
)


class Ref(NamedTuple):
    """Reference to a value of the graph by its name."""

    name: str


class Node(NamedTuple):
    """One operation.

    Attributes:
        operator: Name of the operator without the underscore of an in-place operator, such as 'conv2d'.
        overload: Overload of the operator, such as 'Tensor'.
        arguments: Positional arguments: `Ref`s, plain values and tuples of them.
        options: Keyword arguments.
        outputs: Names of the results.
        is_list: Whether the results are a list or tuple.
        line: Line of the user's model, such as 'net.py, line 12: x = torch.relu(x)'; '' if it is unknown.
    """

    operator: str
    overload: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    outputs: tuple[str, ...]
    is_list: bool
    line: str

    def refs(self) -> list[str]:
        """Lists the names of all values that the node reads."""
        return list(_refs((self.arguments, tuple(self.options.values()))))


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
    nodes = _resolved([_node(entry) for entry in graph['nodes']], names, source)
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


def _resolved(nodes: list[Node], names: dict[str, str], source: str) -> list[Node]:
    """Makes later nodes read the result of an in-place operator where they read its input in torch.

    Args:
        nodes: Nodes of the file.
        names: Receives the new name of each value that has one.
        source: Name of the model for error messages.

    Raises:
        UserError: If a view of changed memory is read later.
    """
    memory: dict[str, str] = {}
    members: dict[str, set[str]] = {}
    views: dict[str, Node] = {}
    stale: dict[str, str] = {}
    resolved = []

    def replace(old: str, new: str, line: str) -> None:
        """Makes `new` the value of a name, and all other names of its memory unreadable."""
        names.update({name: new for name, newest in names.items() if newest == old} | {old: new})
        group = memory.get(old, old)
        stale.update(dict.fromkeys(members.get(group, set()) - {old}, line))
        members[group] = {new}
        memory[new] = group

    for node in nodes:
        node = node._replace(
            arguments=_renamed(node.arguments, names),
            options={name: _renamed(value, names) for name, value in node.options.items()},
        )
        for name in node.refs():
            if name in stale:
                raise UserError(
                    f'{source}: {node.line or node.operator} reads memory that was changed in place before, in '
                    f'{stale[name] or "another line"}; write this without in-place operators.'
                )
        first = node.arguments[0].name if node.arguments and isinstance(node.arguments[0], Ref) else ''
        if node.operator.endswith('_') and not node.operator.endswith('__') and first:
            (result,) = node.outputs
            resolved.append(node._replace(operator=node.operator[:-1]))
            replace(first, result, node.line)
            # A changed part is written back into the whole.
            while first in views:
                view = views[first]
                whole = names.get(view.arguments[0].name, view.arguments[0].name)
                stale.pop(whole, None)
                written = f'{whole}__{result}'
                arguments = (Ref(whole), Ref(result), *view.arguments[1:])
                resolved.append(view._replace(operator=f'{view.operator}_scatter', arguments=arguments, outputs=(written,)))
                replace(whole, written, node.line)
                first, result = view.arguments[0].name, written
            continue
        if node.operator in VIEWS and first:
            group = memory.get(first, first)
            members.setdefault(group, {group}).update(node.outputs)
            memory |= dict.fromkeys(node.outputs, group)
            if node.operator in ('slice', 'select'):
                views[node.outputs[0]] = node
        resolved.append(node)
    return resolved


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    match value:
        case Ref(name):
            return Ref(names.get(name, name))
        case tuple():
            return tuple(_renamed(item, names) for item in value)
    return value


def _refs(value: Any) -> Iterator[str]:
    match value:
        case Ref(name):
            yield name
        case tuple():
            for item in value:
                yield from _refs(item)


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
