"""The ATen operators that PyTorch programs may use, as functions in JAX."""

from aft_jax.interchange.torch_operators import creation, elementwise, layers, pooling, reductions, shapes
from aft_jax.interchange.torch_operators.registry import OPERATORS, Operator
from aft_jax.interchange.torch_operators.values import Maps, Value, maps, plain

__all__ = [
    'OPERATORS',
    'creation',
    'Maps',
    'Operator',
    'Value',
    'elementwise',
    'layers',
    'maps',
    'plain',
    'pooling',
    'reductions',
    'shapes',
]
