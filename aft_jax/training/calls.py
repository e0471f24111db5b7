"""Compiled calls of several training steps: how many steps a call takes, and where calls begin and end."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.sharding import Mesh

from aft_jax.runtime import sharding
from aft_jax.training.data_feed import read, shardings
from aft_jax.training.stage import RunOptions
from aft_jax.training.state import Step

# Long enough to hide the cost of a call on an accelerator, short enough to log often.
STEPS_PER_CALL_ON_ACCELERATORS = 50


def steps_per_call(options: RunOptions, on_cpu: int, ends: Sequence[int], intervals: Sequence[int]) -> int:
    """Chooses how many training steps one compiled call takes.

    A CPU takes a number that leaves no steps over, because those would need a second compiled program. An accelerator
    takes the number that needs the fewest calls.

    Args:
        options: Section `run` of the config, which may set the number.
        on_cpu: Largest useful number on a CPU.
        ends: Steps at which phases end.
        intervals: Numbers of steps after which the loop logs, saves or evaluates.
    """
    if options.steps_per_call:
        return options.steps_per_call
    lengths = [after - before for before, after in _stretches(ends, intervals)]
    if jax.default_backend() == 'cpu':
        return max(n for n in range(1, on_cpu + 1) if math.gcd(*lengths) % n == 0)
    return min(range(STEPS_PER_CALL_ON_ACCELERATORS, 0, -1), key=lambda n: sum(sum(divmod(s, n)) for s in lengths))


def plan_calls(first: int, ends: Sequence[int], intervals: Sequence[int], length: int) -> Iterator[tuple[int, int]]:
    """Plans the compiled calls of a stage, each of `length` steps, or of one step where fewer are left.

    So two programs are compiled at most. A stretch is what lies between two steps at which the loop logs, saves,
    evaluates or changes its phase. Calls are counted from the beginning of their stretch, so that a resumed stage makes
    the same calls.

    Args:
        first: Steps taken already.
        ends: Steps at which phases end.
        intervals: Numbers of steps after which the loop logs, saves or evaluates.
        length: Steps in a call.

    Yields:
        Steps before the call, and steps after it.
    """
    for before, after in _stretches(ends, intervals):
        while first < after:
            whole = (first - before) % length == 0 and first + length <= after
            last = first + length if whole else first + 1
            yield first, last
            first = last


def _stretches(ends: Sequence[int], intervals: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields the first and last step of every stretch of the stage."""
    return itertools.pairwise(sorted({0, *ends, *itertools.chain(*(range(n, ends[-1], n) for n in intervals))}))


def compile_steps(mesh: Mesh, step: Step, options: dict[str, str] | None) -> Callable:
    """Compiles a call of several training steps.

    Args:
        mesh: Devices.
        step: One training step.
        options: XLA options.

    Returns:
        (state, data, constants, fed, key) -> (state, metrics of shape [steps]); `data_feed` describes data and fed.
    """

    def one(state, data, constants, fed, key):
        batch, *second = read(data, fed)
        batch['constants'] = constants
        if second:
            batch['second'] = second[0]
        return step(state, batch, jax.random.fold_in(key, state.step))

    def call(state, data, constants, fed, key):
        steps = len(jax.tree.leaves(fed)[0])
        if steps == 1:
            state, metrics = one(state, data, constants, jax.tree.map(lambda x: x[0], fed), key)
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(lambda s, f: one(s, data, constants, f, key), state, fed)

    whole = sharding.replicated(mesh)
    return jax.jit(call, in_shardings=shardings(mesh), out_shardings=whole, donate_argnums=0, compiler_options=options)
