"""Operators that work on each element: arithmetic, activations, comparisons."""

import operator as python
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from aft_jax.interchange.torch_operators.registry import elementwise, operator, unary

ROUNDINGS = {None: lambda x: x, 'floor': jnp.floor, 'trunc': jnp.trunc}


def add(x, other, *, alpha=1):
    """Computes x + alpha other, also of Python numbers."""
    return x + other if alpha == 1 else x + other * alpha


def subtract(x, other, *, alpha=1):
    """Computes x - alpha other."""
    return x - other if alpha == 1 else x - other * alpha


def divide(x, other, *, rounding_mode=None):
    """Divides as torch does: integers give floating-point numbers unless the result is rounded."""
    integers = all(
        isinstance(value, int) or jnp.issubdtype(jnp.result_type(value), jnp.integer) for value in (x, other)
    )
    if hasattr(x, 'astype') and integers:
        x = x.astype(jnp.float32)
        other = other.astype(jnp.float32) if hasattr(other, 'astype') else other
    quotient = ROUNDINGS[rounding_mode](x / other)
    return quotient.astype(jnp.int32) if integers and rounding_mode and hasattr(quotient, 'astype') else quotient


def power(x, exponent):
    """Computes x ** exponent. A small whole exponent has no logarithm in its gradient."""
    if isinstance(exponent, float) and exponent.is_integer():
        exponent = int(exponent)
    return x**exponent


def clamp(x, smallest=None, largest=None):
    """Clips to [smallest, largest]; the gradient at a bound is that of torch, 1."""
    inside = jnp.ones(x.shape, bool)
    bounded = x
    if smallest is not None:
        inside, bounded = inside & (x >= smallest), jnp.maximum(bounded, smallest)
    if largest is not None:
        inside, bounded = inside & (x <= largest), jnp.minimum(bounded, largest)
    return jnp.where(inside, x, jax.lax.stop_gradient(bounded))


def inside(x, low, high):
    """Clips to (low, high) with torch's gradient of hardtanh, 0 at both bounds."""
    return jnp.where((x > low) & (x < high), x, jax.lax.stop_gradient(jnp.clip(x, low, high)))


def hardsigmoid(x):
    """Computes clip(x / 6 + 1 / 2, 0, 1)."""
    return inside(x, -3.0, 3.0) / 6 + 0.5


def gelu(x, *, approximate='none'):
    """Computes x times the normal distribution function of x, or torch's approximation by tanh."""
    return jax.nn.gelu(x, approximate=approximate == 'tanh')


def elu(x, alpha=1.0, scale=1.0, input_scale=1.0):
    """Computes scale (x for positive x, else alpha (exp(input_scale x) - 1))."""
    return scale * jnp.where(x > 0, x, alpha * jnp.expm1(jnp.where(x > 0, 0.0, x) * input_scale))


def softplus(x, beta=1.0, threshold=20.0):
    """Computes log(1 + exp(beta x)) / beta."""
    return jnp.where(x * beta > threshold, x, jax.nn.softplus(x * beta) / beta)


def masked_fill(x, mask, value):
    """Replaces the elements of x where the mask is true."""
    return jnp.where(mask.astype(bool), jnp.asarray(value, x.dtype), x)


def where(condition, x, other):
    """Chooses between two values."""
    return jnp.where(condition.astype(bool), x, other)


UNARY: dict[str, Callable[..., Any]] = {
    'relu': jax.nn.relu,
    'sigmoid': jax.nn.sigmoid,
    'tanh': jnp.tanh,
    'exp': jnp.exp,
    'log': jnp.log,
    'sqrt': jnp.sqrt,
    'rsqrt': jax.lax.rsqrt,
    'neg': jnp.negative,
    'abs': jnp.abs,
    'sin': jnp.sin,
    'cos': jnp.cos,
    'erf': jax.lax.erf,
    'square': jnp.square,
    'reciprocal': jnp.reciprocal,
    'floor': jnp.floor,
    'logical_not': jnp.logical_not,
    'bitwise_not': jnp.invert,
    'silu': jax.nn.silu,
    'mish': lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    'log_sigmoid': jax.nn.log_sigmoid,
    'softsign': jax.nn.soft_sign,
    'relu6': lambda x: inside(x, 0.0, 6.0),
    'hardsigmoid': hardsigmoid,
    'hardswish': lambda x: x * hardsigmoid(x),
    'gelu': gelu,
    'elu': elu,
    'selu': jax.nn.selu,
    'softplus': softplus,
    'leaky_relu': lambda x, slope=0.01: jnp.where(x > 0, x, slope * x),
    'hardtanh': lambda x, low=-1.0, high=1.0: inside(x, low, high),
    'clamp': clamp,
    'clip': clamp,
    'clamp_min': lambda x, low: clamp(x, low),
    'clamp_max': lambda x, high: clamp(x, None, high),
}
for _name, _function in UNARY.items():
    unary(_name, _function)

BINARY: dict[str, Callable[..., Any]] = {
    'add': add,
    'sub': subtract,
    'rsub': lambda x, other, alpha=1: subtract(other, x, alpha=alpha),
    'mul': lambda x, other: x * other,
    'div': divide,
    'truediv': divide,
    'floordiv': python.floordiv,
    'floor_divide': python.floordiv,
    'mod': python.mod,
    'remainder': python.mod,
    'pow': power,
    'maximum': jnp.maximum,
    'minimum': jnp.minimum,
    'eq': python.eq,
    'ne': python.ne,
    'lt': python.lt,
    'le': python.le,
    'gt': python.gt,
    'ge': python.ge,
    'logical_and': jnp.logical_and,
    'logical_or': jnp.logical_or,
}
for _name, _function in BINARY.items():
    elementwise(_name, 2, _function)


@operator('masked_fill')
def _masked_fill(x, mask, value):
    return masked_fill(x, jnp.broadcast_to(mask, x.shape), value)


elementwise('where', 3, where)


@operator('fill', 'copy')
def fill(x, value, *arguments):
    """Replaces all elements by a number or another tensor."""
    return jnp.broadcast_to(jnp.asarray(value, x.dtype), x.shape)


@operator('zero')
def zero(x):
    """Replaces all elements by 0."""
    return jnp.zeros_like(x)


@operator('prelu')
def prelu(x, weight):
    """Multiplies negative elements by the weight of their channel."""
    shape = [1] * x.ndim
    if x.ndim > 1:
        shape[1] = weight.size
    return jnp.where(x > 0, x, x * weight.reshape(shape))
