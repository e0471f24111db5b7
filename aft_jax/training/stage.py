"""What the training loop takes and returns: runs, stages, evaluation hooks."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from aft_jax.runtime.preemption import Watch
from aft_jax.training.metrics import MetricWriter
from aft_jax.training.state import Step


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
