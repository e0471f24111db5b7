"""The table of operators: the name of an ATen operator -> its function in JAX."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from aft_jax.interchange.torch_operators.values import Maps, aligned, plain


class Operator(NamedTuple):
    """An operator.

    Attributes:
        function: Function of the operator's arguments in torch's order.
        takes_maps: Whether the function handles `Maps` itself; otherwise it gets arrays with torch's axes.
    """

    function: Callable[..., Any]
    takes_maps: bool

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Applies the operator to arrays, `Maps` and plain values."""
        if not self.takes_maps:
            arguments = tuple(_plain(argument) for argument in arguments)
            options = {name: _plain(value) for name, value in options.items()}
        return self.function(*arguments, **options)


OPERATORS: dict[str, Operator] = {}


def operator(*names: str, takes_maps: bool = False) -> Callable:
    """Registers a function under the names of operators."""

    def register(function: Callable) -> Callable:
        OPERATORS.update(dict.fromkeys(names, Operator(function, takes_maps)))
        return function

    return register


def unary(name: str, function: Callable[[jax.Array], jax.Array]) -> None:
    """Registers a function of each element, which is independent of the layout."""
    elementwise(name, 1, function)


def elementwise(name: str, count: int, function: Callable[..., jax.Array]) -> None:
    """Registers a function whose first `count` arguments are tensors or numbers that are broadcast."""

    def call(*arguments: Any, **options: Any) -> Any:
        operands, as_maps = aligned(arguments[:count])
        result = function(*operands, *arguments[count:], **options)
        return Maps(result) if as_maps else result

    OPERATORS[name] = Operator(call, takes_maps=True)


def _plain(value: Any) -> Any:
    return tuple(map(plain, value)) if isinstance(value, tuple) else plain(value)
