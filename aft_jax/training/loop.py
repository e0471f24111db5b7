"""The one training loop: infecting, fine-tuning and AFT differ in the step, never in the loop."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from aft_jax.data.order import Order
from aft_jax.errors import UserError
from aft_jax.randomness import key_for
from aft_jax.runtime import sharding as placement
from aft_jax.runtime.preemption import Preempted, Watch
from aft_jax.training.checkpoint import Checkpoints
from aft_jax.training.data_feed import Feed, read, shardings
from aft_jax.training.metrics import MetricWriter, Progress
from aft_jax.training.state import Step

# Long enough to hide the cost of a call on an accelerator, short enough to log often.
STEPS_PER_CALL_ON_ACCELERATORS = 50


class Phase(NamedTuple):
    """A stretch of a stage that uses one step function, up to (not including) step number `until`."""

    step: Step
    until: int


class Onlooker(NamedTuple):
    """Watches stages for the record alone: it writes what it sees, and nothing comes back to those who train.

    Attributes:
        look: Called with (stage, step, epochs so far, state).
        points: How often in a stage, evenly over its steps, beside its beginning.
    """

    look: Callable[[str, int, float, Any], None]
    points: int


class Run(NamedTuple):
    """What every stage of one experiment shares.

    Attributes:
        seed: The experiment's seed.
        workdir: Where checkpoints and metrics go.
        mesh: The devices.
        writer: Of metrics.
        options: `config.run`: how the work is carried out.
        watch: For the sign to save and stop.
        compiler_options: XLA's, for the steps.
        steps_on_cpu: Up to how many steps a CPU takes in one call faster than one by one.
        onlooker: Of all stages, or None.
    """

    seed: int
    workdir: Path
    mesh: Mesh
    writer: MetricWriter
    options: ml_collections.ConfigDict
    watch: Watch
    compiler_options: dict[str, str] | None = None
    steps_on_cpu: int = 1
    onlooker: Onlooker | None = None


class Fitted(NamedTuple):
    """The state after a stage, and the wall-clock seconds that all its starts took together, but for measuring it."""

    state: Any
    seconds: float


def fit(
    run: Run,
    stage: str,
    state: Any,
    phases: Sequence[Phase],
    arrays: dict[str, np.ndarray],
    batch_size: int,
    *,
    fixed: Any = None,
    streams: int = 1,
    probe: Callable[[Any], dict[str, float]] | None = None,
    probe_every: int = 0,
) -> Fitted:
    """Trains `state` through `phases`, from the newest checkpoint of `stage` where there is one.

    A resumed stage ends in the same state, bit for bit, as one that was never interrupted: batches and keys are
    functions of (seed, stage, step).

    Args:
        run: The experiment.
        stage: The name of checkpoints, metrics and randomness, such as 'infect'.
        state: Pytree with a `step`, before the first step.
        phases: In order; the last one's `until` is the length of the stage.
        arrays: 'images' uint8 [N, H, W, C] and 'labels' int32 [N]; other arrays of N rows travel along.
        batch_size: Images in a step, all devices together.
        fixed: Pytree of arrays that every step finds unchanged in batch['fixed'], such as a teacher's variables.
        streams: Independently shuffled batches that a step sees; the second is batch['paired'].
        probe: Measures a state for the record; its values are written, and nothing else depends on them.
        probe_every: Steps between two probes; 0 for none.

    Returns:
        The state after the last step and the seconds spent.

    Raises:
        UserError: The batch does not fit the devices, or the loss stopped being a number.
        Preempted: The run was told to stop, and the state is saved.
    """
    placement.check_batch_size(run.mesh, batch_size, 'batch_size')
    options = run.options
    total = phases[-1].until
    started = time.monotonic()
    state = placement.copy(run.mesh, state)  # the loop gives its state away to each step; the caller keeps theirs
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(run.workdir / 'checkpoints' / stage, keep=options.keep_checkpoints)
        )
        earlier = 0.0
        pending: list[dict[str, Any]] = []
        if restored := checkpoints.restore(state):
            state, info = restored
            earlier = info['seconds']
            pending = [
                {name: np.float32(values) for name, values in metrics.items()} for metrics in info.get('pending', [])
            ]
        step = int(state.step)
        if step >= total:
            return Fitted(state, earlier)
        run.writer.rewind(stage, step)

        sizes = len(arrays['labels'])
        orders = [Order(run.seed, f'{stage}/{i}', sizes, batch_size) for i in range(streams)]
        feed = Feed(run.mesh, arrays, orders, options.placement)
        fixed, key = placement.place(run.mesh, (fixed, key_for(run.seed, stage)))
        calls = [_compile(run.mesh, phase.step, run.compiler_options) for phase in phases]
        measures: list[tuple[int, Callable[[int, Any], None]]] = []
        if probe is not None and probe_every:
            measures.append((probe_every, lambda step, state: run.writer.write(stage, step, probe(state))))
        if (onlooker := run.onlooker) is not None:
            every = math.ceil(total / onlooker.points)
            measures.append((every, lambda step, state: onlooker.look(stage, step, step * batch_size / sizes, state)))
            if step == 0:
                started += _measure(state, 0, [measures[-1][1]])
        intervals = [options.log_every, options.checkpoint_every, *(every for every, _ in measures)]
        ends = [phase.until for phase in phases]
        spans = list(_spans(step, ends, intervals, steps_per_call(options, run.steps_on_cpu, ends, intervals)))
        progress = stack.enter_context(Progress(stage, step, total, batch_size))
        fed = stack.enter_context(feed.calls(spans))

        for (first, step), batches in zip(spans, fed, strict=True):
            phase = next(i for i, p in enumerate(phases) if first < p.until)
            state, metrics = placement.settle(run.mesh, calls[phase](state, feed.data, fixed, batches, key))
            pending.append(metrics)
            last = step == total
            saves = last or step % options.checkpoint_every == 0
            if saves or step % options.log_every == 0:
                values = _average(pending)
                pending = []
                _check_finite(stage, step, values)
                run.writer.write(stage, step, values)
                progress.show(step, values)
            started += _measure(state, step, [measure for every, measure in measures if last or step % every == 0])
            stops = run.watch.must_stop() and not last
            if stops:
                _check_finite(stage, step, _average(pending))
            if saves or stops:
                seconds = earlier + time.monotonic() - started
                # Metrics that wait for their line are kept, so that it will be the same one.
                waiting = [{name: np.asarray(x).tolist() for name, x in m.items()} for m in jax.device_get(pending)]
                checkpoints.save(step, state, {'seconds': seconds, 'pending': waiting})
            if stops:
                raise Preempted
    return Fitted(state, seconds)


def _measure(state: Any, step: int, measures: Sequence[Callable[[int, Any], None]]) -> float:
    """Measures a state, and returns the seconds that it took: they are no part of the training's."""
    if not measures:
        return 0.0
    jax.block_until_ready(state)
    started = time.monotonic()
    for measure in measures:
        measure(step, state)
    return time.monotonic() - started


def steps_per_call(
    options: ml_collections.ConfigDict, on_cpu: int, ends: Sequence[int], intervals: Sequence[int]
) -> int:
    """Returns how many training steps one compiled call takes.

    Args:
        options: `config.run`, which may say it.
        on_cpu: The most that a CPU should take. It takes so many that no steps are left over, for which a second
            program would have to be compiled; an accelerator so many that there are the fewest calls.
        ends: The steps at which phases end.
        intervals: After how many steps something else is to be done.
    """
    if options.steps_per_call:
        return options.steps_per_call
    stretches = [after - before for before, after in _stretches(ends, intervals)]
    if jax.default_backend() == 'cpu':
        return max(n for n in range(1, on_cpu + 1) if math.gcd(*stretches) % n == 0)
    return min(range(STEPS_PER_CALL_ON_ACCELERATORS, 0, -1), key=lambda n: sum(sum(divmod(s, n)) for s in stretches))


def _spans(first: int, ends: Sequence[int], intervals: Sequence[int], length: int) -> Iterator[tuple[int, int]]:
    """Yields (first, last + 1) of each call: `length` steps, or a single one where fewer are left before a mark.

    Of these two lengths each is compiled once. Calls are counted from mark to mark, so that a run which goes on cuts
    them where it would have cut them anyway.
    """
    for before, after in _stretches(ends, intervals):
        while first < after:
            whole = (first - before) % length == 0 and first + length <= after
            last = first + length if whole else first + 1
            yield first, last
            first = last


def _stretches(ends: Sequence[int], intervals: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields the steps (before, after) of neighbouring marks, from step 0 on; nothing else is to be done in between."""
    return itertools.pairwise(sorted({0, *ends, *itertools.chain(*(range(n, ends[-1], n) for n in intervals))}))


def _compile(mesh: Mesh, step: Step, options: dict[str, str] | None) -> Callable:
    """Returns the compiled (state, data, fixed, fed, key) -> (state, metrics [n]); see `feed` for data and fed."""

    def one(state, data, fixed, fed, key):
        batch, *paired = read(data, fed)
        batch['fixed'] = fixed
        if paired:
            batch['paired'] = paired[0]
        return step(state, batch, jax.random.fold_in(key, state.step))

    def call(state, data, fixed, fed, key):
        steps = len(jax.tree.leaves(fed)[0])
        if steps == 1:
            state, metrics = one(state, data, fixed, jax.tree.map(lambda x: x[0], fed), key)
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(lambda s, f: one(s, data, fixed, f, key), state, fed)

    whole = placement.replicated(mesh)
    return jax.jit(call, in_shardings=shardings(mesh), out_shardings=whole, donate_argnums=0, compiler_options=options)


def _average(pending: list[dict[str, Any]]) -> dict[str, float]:
    fetched = jax.device_get(pending)
    # Phases need not report the same metrics: each is averaged over the steps that have it.
    names = dict.fromkeys(name for metrics in fetched for name in metrics)
    return {name: float(np.mean(np.concatenate([m[name] for m in fetched if name in m]))) for name in names}


def _check_finite(stage: str, step: int, values: dict[str, float]) -> None:
    broken = sorted((name for name, value in values.items() if not math.isfinite(value)), key=lambda n: n != 'loss')
    if broken:
        raise UserError(
            f'{stage} stopped before step {step}: {broken[0]} is no longer a finite number; lower its learning rate '
            '(in a --workdir of its own; the checkpoints here are good ones).'
        )
