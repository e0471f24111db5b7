"""Counts the FLOPs of a classifier's convolutions and dense layers: two for each multiplication with its sum.

Multiplications with the zeros of a convolution's padding count, as in the measured ceiling. A backward pass costs one
forward pass for the input and one for the weights. Training does not compute the gradient of the images.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.task import TRAININGS, Task


def layers(function: Any, *arguments: Any) -> list[int]:
    """Counts the FLOPs of each convolution and matrix product of a function without loops, in order."""
    return list(_layers(jax.make_jaxpr(function)(*arguments).jaxpr))


def _layers(jaxpr: Any) -> Iterator[int]:
    for equation in jaxpr.eqns:
        match equation.primitive.name:
            case 'conv_general_dilated':
                kernel = equation.invars[1].aval.shape
                outputs = equation.params['dimension_numbers'].rhs_spec[0]
                yield 2 * equation.outvars[0].aval.size * math.prod(kernel) // kernel[outputs]
            case 'dot_general':
                (summed, _), _ = equation.params['dimension_numbers']
                lengths = [equation.invars[0].aval.shape[axis] for axis in summed]
                yield 2 * equation.outvars[0].aval.size * math.prod(lengths)
            case 'cond':  # the last branch has the plain layers; the others are for one platform only
                yield from _layers(equation.params['branches'][-1].jaxpr)
        # jit and custom derivatives store the inner function under different names.
        for inner in equation.params.values():
            inner = getattr(inner, 'jaxpr', inner)
            if hasattr(inner, 'eqns'):
                yield from _layers(inner)


def forward(task: Task) -> list[int]:
    """Counts the FLOPs of each layer for one image."""
    image = jax.ShapeDtypeStruct((1, *task.shape), jnp.float32)
    return layers(task.module.apply, task.variables, image)


def an_image(task: Task) -> dict[str, int]:
    """Computes the FLOPs that each benchmark needs for one image, independent of how a side computes it."""
    first, *rest = forward(task)
    passes = first + sum(rest)
    training, pgd = 3 * passes - first, 2 * task.pgd.steps * passes
    work = {'evaluation': passes, 'pgd7': pgd}
    return work | {name: training + (pgd if kind == 'aft' else 0) for name, (kind, _) in TRAININGS.items()}
