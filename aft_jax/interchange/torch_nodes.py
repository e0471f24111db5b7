"""Nodes of a PyTorch graph, and what its in-place operators mean.

Later nodes read the result of `relu_` where they read its input in torch. A changed slice is written back into the
whole tensor. A graph in which another view of changed memory is read later is refused.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from aft_jax.errors import UserError

# Operators whose result shares the memory of their first input.
VIEWS = frozenset(
    (
        *(
            'alias',
            'as_strided',
            'chunk',
            'contiguous',
            'detach',
            'expand',
            'expand_as',
            'flatten',
            'getitem',
            'movedim',
        ),
        *('narrow', 'permute', 'reshape', 'select', 'slice', 'split', 'split_with_sizes', 'squeeze', 'swapaxes', 't'),
        *('to', 'transpose', 'type_as', 'unbind', 'unflatten', 'unsqueeze', 'view', 'view_as'),
    )
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


def resolve(nodes: list[Node], names: dict[str, str], source: str) -> list[Node]:
    """Makes later nodes read the result of an in-place operator where they read its input in torch; see above.

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
                resolved.append(
                    view._replace(operator=f'{view.operator}_scatter', arguments=arguments, outputs=(written,))
                )
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
