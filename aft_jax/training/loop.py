"""The one training loop: infecting, fine-tuning and AFT differ in the step, never in the loop."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from aft_jax.data.batches import Order
from aft_jax.errors import UserError
from aft_jax.randomness import key_for
from aft_jax.training import mesh as placement
from aft_jax.training.checkpoint import Checkpoints
from aft_jax.training.metrics import MetricWriter, Progress
from aft_jax.training.state import Batch, Step

# Long enough to hide the cost of a call on an accelerator, short enough to compile once and log often.
STEPS_PER_CALL_ON_ACCELERATORS = 50


class Phase(NamedTuple):
    """A stretch of a stage that uses one step function, up to (not including) step number `until`."""

    step: Step
    until: int


class Run(NamedTuple):
    """What every stage of one experiment shares.

    Attributes:
        seed: The experiment's seed.
        workdir: Where checkpoints and metrics go.
        mesh: The devices.
        writer: Of metrics.
        options: `config.run`: how the work is carried out.
    """

    seed: int
    workdir: Path
    mesh: Mesh
    writer: MetricWriter
    options: ml_collections.ConfigDict


class Fitted(NamedTuple):
    """The state after a stage, and the wall-clock seconds that all its starts took together."""

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
    """
    placement.check_batch_size(run.mesh, batch_size, 'batch_size')
    total = phases[-1].until
    started = time.monotonic()
    state = placement.copy(run.mesh, state)  # the loop gives its state away to each step; the caller keeps theirs
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(run.workdir / 'checkpoints' / stage, keep=run.options.keep_checkpoints)
        )
        earlier = 0.0
        if restored := checkpoints.restore(state):
            state, info = restored
            earlier = info['seconds']
        step = int(state.step)
        if step >= total:
            return Fitted(state, earlier)
        run.writer.rewind(stage, step)

        sizes = len(arrays['labels'])
        orders = [Order(run.seed, f'{stage}/{i}', sizes, batch_size) for i in range(streams)]
        data, fixed = placement.place(run.mesh, (arrays, fixed))
        key = placement.place(run.mesh, key_for(run.seed, stage))
        calls = [_compile(run.mesh, phase.step) for phase in phases]
        chunk = run.options.steps_per_call or (1 if jax.default_backend() == 'cpu' else STEPS_PER_CALL_ON_ACCELERATORS)
        intervals = [run.options.log_every, run.options.checkpoint_every] + ([probe_every] if probe_every else [])
        progress = stack.enter_context(Progress(stage, step, total, batch_size))

        pending: list[dict[str, jax.Array]] = []
        while step < total:
            phase = next(i for i, p in enumerate(phases) if step < p.until)
            stop = min([step + chunk, phases[phase].until, *((step // n + 1) * n for n in intervals)])
            indices = np.stack([[order.batch(s) for order in orders] for s in range(step, stop)])
            state, metrics = placement.settle(run.mesh, calls[phase](state, data, fixed, indices, key))
            pending.append(metrics)
            step = stop
            last = step == total
            if last or step % run.options.log_every == 0 or step % run.options.checkpoint_every == 0:
                values = _average(pending)
                pending = []
                _check_finite(stage, step, values)
                run.writer.write(stage, step, values)
                progress.show(step, values)
            if probe is not None and probe_every and (last or step % probe_every == 0):
                run.writer.write(stage, step, probe(state))
            if last or step % run.options.checkpoint_every == 0:
                seconds = earlier + time.monotonic() - started
                checkpoints.save(step, state, {'seconds': seconds})
    return Fitted(state, seconds)


def _compile(mesh: Mesh, step: Step) -> Callable:
    """Returns the compiled (state, data, fixed, indices [n, streams, B], key) -> (state, metrics [n])."""

    def one(state, data, fixed, indices, key):
        batch: Batch = gather(data, indices[0])
        batch['fixed'] = fixed
        if len(indices) > 1:
            batch['paired'] = gather(data, indices[1])
        return step(state, batch, jax.random.fold_in(key, state.step))

    def call(state, data, fixed, indices, key):
        if len(indices) == 1:
            state, metrics = one(state, data, fixed, indices[0], key)
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(lambda s, i: one(s, data, fixed, i, key), state, indices)

    whole, cut = placement.replicated(mesh), placement.along(mesh, 2)
    return jax.jit(call, in_shardings=(whole, whole, whole, cut, whole), out_shardings=whole, donate_argnums=0)


def gather(data: dict[str, jax.Array], indices: jax.Array) -> dict[str, Any]:
    """Returns the rows [B] of every array; uint8 images become float32 in [0, 1]."""
    batch = {name: array[indices] for name, array in data.items()}
    batch['images'] = batch['images'].astype(jnp.float32) / 255.0
    return batch


def _average(pending: list[dict[str, jax.Array]]) -> dict[str, float]:
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
