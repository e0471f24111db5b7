"""The one training loop. Infecting, fine-tuning and AFT differ in their steps, not in the loop."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from aft_jax.data.order import Order
from aft_jax.errors import Preempted, UserError
from aft_jax.randomness import key_for
from aft_jax.runtime import sharding
from aft_jax.runtime.preemption import Watch
from aft_jax.training.checkpoint import Checkpoints
from aft_jax.training.data_feed import Feed, read, shardings
from aft_jax.training.metrics import MetricWriter, Progress
from aft_jax.training.state import Step

# Long enough to hide the cost of a call on an accelerator, short enough to log often.
STEPS_PER_CALL_ON_ACCELERATORS = 50


class Phase(NamedTuple):
    """Part of a stage that uses one step function, up to (not including) step number `until`."""

    step: Step
    until: int


class EvalPoint(NamedTuple):
    """A moment of a stage at which a hook evaluates the model.

    Attributes:
        stage: Name of the stage.
        step: Steps taken.
        epochs: Epochs taken.
        state: State after that step; it has the classifier's `variables`.
    """

    stage: str
    step: int
    epochs: float
    state: Any


class EvalHook(NamedTuple):
    """Evaluates the model during a stage. It is for the record alone and never influences the training.

    Attributes:
        evaluate: Function that scores the model; its values are written to metrics.jsonl.
        every_steps: Steps between two evaluations. The last step is always evaluated.
        points: Number of evaluations, spread evenly over the stage, when `every_steps` is 0.
        at_start: Whether the model is evaluated before the first step too.
    """

    evaluate: Callable[[EvalPoint], dict[str, float]]
    every_steps: int = 0
    points: int = 1
    at_start: bool = False

    def interval(self, total: int) -> int:
        """Computes the steps between two evaluations in a stage of `total` steps."""
        return self.every_steps or math.ceil(total / self.points)


class RunOptions(NamedTuple):
    """Section `run` of the config: how the work is carried out. See `aft_jax.config` for the fields."""

    placement: str
    steps_per_call: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    evaluate_every: float
    purify_points: int
    eval_batch_size: int
    compile_cache: str


class Run(NamedTuple):
    """What all stages of one experiment share.

    Attributes:
        seed: Seed of the experiment.
        workdir: Directory for checkpoints and metrics.
        mesh: Devices.
        writer: Writer of metrics.
        options: Section `run` of the config.
        watch: Watch for the signal to save and stop.
        compiler_options: XLA options of the training steps.
        steps_on_cpu: Largest useful number of training steps per compiled call on a CPU.
        eval_hook: Hook of all stages that train a model, or None.
        must_be_finished: Whether a stage that still has steps to take raises `NotFinished` instead.
    """

    seed: int
    workdir: Path
    mesh: Mesh
    writer: MetricWriter
    options: RunOptions
    watch: Watch
    compiler_options: dict[str, str] | None = None
    steps_on_cpu: int = 1
    eval_hook: EvalHook | None = None
    must_be_finished: bool = False


class TrainingStage(NamedTuple):
    """What one stage trains, on what, and how.

    Attributes:
        name: Name of checkpoints, metrics and randomness, such as 'infect'.
        state: Pytree with a `step`, before the first step.
        phases: Phases in order. The last one's `until` is the length of the stage.
        arrays: Training set: 'images' uint8 [N, H, W, C], 'labels' int32 [N], and perhaps other arrays of N rows.
        batch_size: Images in a step, over all devices together.
        constants: Pytree of arrays that every step finds in batch['constants'], such as a teacher's variables.
        num_streams: Number of independently shuffled batches in a step, 1 or 2. The second is batch['second'].
        eval_hooks: Hooks of this stage, beside that of the run.
        trains_model: Whether the state has the `variables` of a model; masks of neurons, for one, have not.
    """

    name: str
    state: Any
    phases: Sequence[Phase]
    arrays: dict[str, np.ndarray]
    batch_size: int
    constants: Any = None
    num_streams: int = 1
    eval_hooks: tuple[EvalHook, ...] = ()
    trains_model: bool = True

    @property
    def total(self) -> int:
        """Steps of the stage."""
        return self.phases[-1].until

    @property
    def ends(self) -> list[int]:
        """Step numbers at which the phases end."""
        return [phase.until for phase in self.phases]


class Fitted(NamedTuple):
    """Result of a stage.

    Attributes:
        state: State after the last step.
        seconds: Wall-clock seconds of all starts together, without the time of evaluation hooks.
    """

    state: Any
    seconds: float


class NotFinished(Exception):
    """Raised by a stage that still has steps to take in a run that `must_be_finished`."""

    def __init__(self, stage: str, step: int):
        """Creates the error for a stage that has taken `step` steps."""
        super().__init__(stage, step)
        self.stage, self.step = stage, step


def fit(run: Run, stage: TrainingStage) -> Fitted:
    """Trains a stage to its end, from its newest checkpoint where there is one.

    A resumed stage ends in the same state, bit for bit, as one that was never interrupted. Batches and keys are
    functions of (seed, name of the stage, step).

    Args:
        run: Experiment.
        stage: Stage to train.

    Returns:
        The state after the last step, and the seconds spent.

    Raises:
        UserError: The batch does not fit the devices, or the loss is no longer a finite number.
        Preempted: The run received the signal to stop, and the state is saved.
        NotFinished: Steps are left, and the run must be finished.
    """
    sharding.check_batch_size(run.mesh, stage.batch_size, 'batch_size')
    options, total = run.options, stage.total
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(run.workdir / 'checkpoints' / stage.name, keep=options.keep_checkpoints)
        )
        state, earlier_seconds, metrics = restore_or_start(run, stage, checkpoints)
        step = int(state.step)
        if step >= total:
            return Fitted(state, earlier_seconds)
        if run.must_be_finished:
            raise NotFinished(stage.name, step)
        run.writer.rewind(stage.name, step)

        num_images = len(stage.arrays['labels'])
        orders = [Order(run.seed, f'{stage.name}/{i}', num_images, stage.batch_size) for i in range(stage.num_streams)]
        feed = Feed(run.mesh, stage.arrays, orders, options.placement)
        constants, key = sharding.replicate(run.mesh, (stage.constants, key_for(run.seed, stage.name)))
        compiled = [compile_steps(run.mesh, phase.step, run.compiler_options) for phase in stage.phases]
        hooks = stage.eval_hooks + ((run.eval_hook,) if run.eval_hook and stage.trains_model else ())
        if step == 0:
            started += _evaluate(run, stage, 0, state, [hook for hook in hooks if hook.at_start])
        intervals = [options.log_every, options.checkpoint_every, *(hook.interval(total) for hook in hooks)]
        length = steps_per_call(options, run.steps_on_cpu, stage.ends, intervals)
        calls = list(plan_calls(step, stage.ends, intervals, length))
        progress = stack.enter_context(Progress(stage.name, step, total, stage.batch_size))
        batches_of_calls = stack.enter_context(feed.calls(calls))

        # NOTE: do not change the order of operations. A resumed run must write the same lines and count the same
        # seconds: take the steps, check and log their metrics, evaluate, save, and only then stop.
        for (first, step), batches in zip(calls, batches_of_calls, strict=True):
            phase = next(i for i, end in enumerate(stage.ends) if first < end)
            state, step_metrics = compiled[phase](state, feed.data, constants, batches, key)
            state, step_metrics = sharding.wait_on_virtual_devices(run.mesh, (state, step_metrics))
            metrics.add(step_metrics)
            last = step == total
            saves = last or step % options.checkpoint_every == 0
            if saves or step % options.log_every == 0:
                values = metrics.average()
                metrics.clear()
                _check_finite(stage.name, step, values)
                run.writer.write(stage.name, step, values)
                progress.show(step, values)
            due = [hook for hook in hooks if last or step % hook.interval(total) == 0]
            started += _evaluate(run, stage, step, state, due)
            stops = run.watch.must_stop() and not last
            if stops:
                _check_finite(stage.name, step, metrics.average())
            if saves or stops:
                seconds = earlier_seconds + time.monotonic() - started
                checkpoints.save(step, state, {'seconds': seconds, 'pending': metrics.to_json()})
            if stops:
                raise Preempted
    return Fitted(state, seconds)


class MetricBuffer:
    """Metrics of the steps since the last log line. A checkpoint keeps them, so that a resumed run logs the same."""

    def __init__(self, saved: Iterable[dict[str, list[float]]] = ()):
        """Creates a buffer, from what `to_json` returned where a stage is resumed."""
        self._calls: list[dict[str, Any]] = [
            {name: np.asarray(values, np.float32) for name, values in metrics.items()} for metrics in saved
        ]

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds the metrics of one call, each of shape [steps]; they may still be computed."""
        self._calls.append(metrics)

    def clear(self) -> None:
        """Forgets all metrics."""
        self._calls = []

    def average(self) -> dict[str, float]:
        """Averages each metric over the steps that report it; phases need not report the same ones."""
        fetched = jax.device_get(self._calls)
        names = dict.fromkeys(name for metrics in fetched for name in metrics)
        return {name: float(np.mean(np.concatenate([m[name] for m in fetched if name in m]))) for name in names}

    def to_json(self) -> list[dict[str, list[float]]]:
        """Converts the metrics to plain values."""
        return [
            {name: np.asarray(x).tolist() for name, x in metrics.items()} for metrics in jax.device_get(self._calls)
        ]


def restore_or_start(run: Run, stage: TrainingStage, checkpoints: Checkpoints) -> tuple[Any, float, MetricBuffer]:
    """Restores the newest checkpoint of a stage, or copies its first state to the devices.

    Args:
        run: Experiment.
        stage: Stage to train.
        checkpoints: Checkpoints of the stage.

    Returns:
        The state, the seconds that earlier starts took, and the metrics that still wait for their log line.
    """
    # Each step consumes the state that it is given, so the loop works on a copy and the caller keeps its own.
    state = sharding.copy(run.mesh, stage.state)
    restored = checkpoints.restore(state)
    if restored is None:
        return state, 0.0, MetricBuffer()
    state, info = restored
    return state, info['seconds'], MetricBuffer(info.get('pending', []))


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


def _evaluate(run: Run, stage: TrainingStage, step: int, state: Any, hooks: Sequence[EvalHook]) -> float:
    """Lets hooks evaluate a state, and returns the seconds that it took: they are no part of the training's."""
    if not hooks:
        return 0.0
    jax.block_until_ready(state)
    started = time.monotonic()
    epochs = step * stage.batch_size / len(stage.arrays['labels'])
    for hook in hooks:
        run.writer.write(stage.name, step, hook.evaluate(EvalPoint(stage.name, step, epochs, state)))
    return time.monotonic() - started


def _check_finite(stage: str, step: int, values: dict[str, float]) -> None:
    """Raises a UserError when a metric is not finite, before anything of it is saved."""
    broken = sorted((name for name, value in values.items() if not math.isfinite(value)), key=lambda n: n != 'loss')
    if broken:
        raise UserError(
            f'{stage} stopped before step {step}: {broken[0]} is no longer a finite number; lower its learning rate '
            '(in a --workdir of its own; the checkpoints here are good ones).'
        )
