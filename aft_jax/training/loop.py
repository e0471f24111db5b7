"""The one training loop. Infecting, fine-tuning and AFT differ in their steps, not in the loop."""

import contextlib
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from aft_jax.data.order import Order
from aft_jax.errors import Preempted, UserError
from aft_jax.randomness import key_for
from aft_jax.runtime import sharding
from aft_jax.training.calls import compile_steps, plan_calls, steps_per_call
from aft_jax.training.checkpoint import Checkpoints
from aft_jax.training.data_feed import Feed
from aft_jax.training.metrics import Progress
from aft_jax.training.stage import EvalHook, EvalPoint, Fitted, NotFinished, Run, TrainingStage


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
            Checkpoints(run.workdir / 'checkpoints' / stage.name, options.keep_checkpoints, run.must_be_finished)
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
        # Phases that take turns share two programs.
        steps = dict.fromkeys(phase.step for phase in stage.phases)
        programs = {step: compile_steps(run.mesh, step, run.compiler_options) for step in steps}
        compiled = [programs[phase.step] for phase in stage.phases]
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
                raise Preempted(run.watch.signal)
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
