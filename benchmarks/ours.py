"""Our side: the steps of the package on one device, compiled and fed as in its training loop.

The data are on the device and a call takes indices. One call takes as many steps as in a run (`calls.steps_per_call`).
An epoch fetches its metrics as often as the loop writes them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from aft_jax.adversarial.pgd import perturb
from aft_jax.attacks.training import attack_settings, standard_training
from aft_jax.config import as_options
from aft_jax.data.augment import AugmentOptions
from aft_jax.defenses.aft_universal_options import UniversalAftOptions
from aft_jax.defenses.aft_universal_step import aft_step
from aft_jax.models import logits_function
from aft_jax.models.cpu_compilation import compiler_options, steps_per_call
from aft_jax.randomness import key_for
from aft_jax.runtime import sharding as placement
from aft_jax.training import calls, state
from aft_jax.training.data_feed import Feed
from aft_jax.training.optimiser import sgd
from benchmarks.task import TRAININGS, Task, first_batch
from benchmarks.timing import Work


class Ours:
    """The steps of the package that are timed."""

    def __init__(self, task: Task):
        """Moves the task's data and weights to the first device."""
        self.task = task
        self._mesh = placement.make_mesh(jax.devices()[:1])
        images = task.images
        self._feed = Feed(self._mesh, {'images': images.pixels, 'labels': images.labels}, [task.order], 'device')
        self._variables = placement.replicate(self._mesh, task.variables)
        self.trainings = {'infect': self._infecting(), 'aft': self._fine_tuning()}

        def examples(variables: dict, pixels: jax.Array, labels: jax.Array) -> jax.Array:
            model = logits_function(task.module, variables)
            return perturb(model, pixels, labels, jax.random.key(0), task.pgd)

        def logits(variables: dict, pixels: jax.Array) -> jax.Array:
            return logits_function(task.module, variables)(pixels)

        options = compiler_options(task.module)
        self._logits = Program(jax.jit(logits, compiler_options=options))
        self._examples = Program(jax.jit(examples, compiler_options=options))

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Computes the logits [B, K] of float32 images [B, H, W, C] in [0, 1], in evaluation mode."""
        return np.asarray(self._logits(self._variables, *self._placed(pixels)))

    def examples(self, pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Computes adversarial examples, float32 [B, H, W, C]."""
        return np.asarray(self._examples(self._variables, *self._placed(pixels, labels)))

    def work(self, benchmark: str) -> Work:
        """Builds the work of one of `task.BENCHMARKS`."""
        match benchmark:
            case 'pgd7':
                return self._repeated(self._examples, True)
            case 'evaluation':
                return self._repeated(self._logits, False)
        training, epoch = TRAININGS[benchmark]
        return self.trainings[training].work(epoch)

    def _placed(self, *arrays: np.ndarray) -> Any:
        return placement.replicate(self._mesh, arrays)

    def _repeated(self, program: 'Program', labelled: bool) -> Work:
        """Builds work on one batch that is on the device already."""
        pixels, labels = first_batch(self.task)
        arguments = self._placed(pixels, labels) if labelled else self._placed(pixels)

        def run(times: int) -> None:
            for _ in range(times):
                result = program(self._variables, *arguments)
            jax.block_until_ready(result)

        return Work(run, program.bytes)

    def _infecting(self) -> 'Training':
        task, options = self.task, self.task.config.train
        optimiser = sgd(
            options.learning_rate, 'constant', task.steps, momentum=options.momentum, weight_decay=options.weight_decay
        )
        before = state.create(task.variables, optimiser)
        settings = attack_settings(task.config, task.images.pixels.shape)
        training = standard_training(None, task.module, optimiser, before, settings)
        return Training(task, self._mesh, self._feed, training.step, before, epochs=options.epochs)

    def _fine_tuning(self) -> 'Training':
        task, options, train = self.task, self.task.config.aft_released, self.task.config.train
        optimiser = sgd(
            options.learning_rate,
            options.schedule,
            task.steps,
            momentum=train.momentum,
            weight_decay=train.weight_decay,
        )
        step = partial(
            aft_step,
            module=task.module,
            optimiser=optimiser,
            options=as_options(UniversalAftOptions, options),
            augmentation=as_options(AugmentOptions, task.config.augment),
        )
        before = state.create(task.variables, optimiser)
        return Training(task, self._mesh, self._feed, step, before, self._variables, epochs=options.epochs)


class Training:
    """A training state with its compiled step."""

    def __init__(
        self, task: Task, mesh: Any, feed: Feed, step: Any, before: Any, constants: Any = None, *, epochs: int
    ):
        """Starts at the state `before`. Every step gets `constants`; a whole training would take `epochs`."""
        options = task.config.run
        self._feed, self._constants, self._log_every = feed, constants, options.log_every
        self._program = Program(calls.compile_steps(mesh, step, compiler_options(task.module)))
        self._key = placement.replicate(mesh, key_for(task.config.seed, 'benchmarks'))
        self.state = placement.copy(mesh, before)
        length = calls.steps_per_call(options, steps_per_call(task.module), [epochs * task.steps], [self._log_every])
        # The first epoch is repeated. Its calls end where the loop writes metrics.
        self._epoch = list(calls.plan_calls(0, [task.steps], [self._log_every], length))
        self._calls = [(i, i + length) for i in range(0, task.steps - length + 1, length)]

    def take(self, spans: Sequence[tuple[int, int]], logs: bool) -> dict[str, jax.Array]:
        """Takes the steps of the spans; returns the last metrics. With `logs` it fetches metrics as the loop does."""
        pending = []
        with self._feed.calls(spans) as fed:
            for (first, last), batches in zip(spans, fed, strict=True):
                arguments = self.state, self._feed.data, self._constants, batches, self._key
                self.state, metrics = self._program(*arguments, steps=last - first)
                pending.append(metrics)
                if logs and (last % self._log_every == 0 or last == spans[-1][1]):
                    jax.device_get(pending)
                    pending = []
        return metrics

    def work(self, epoch: bool) -> Work:
        """Builds the work of whole epochs, or of single calls."""

        def run(times: int) -> None:
            if epoch:
                for _ in range(times):
                    self.take(self._epoch, logs=True)
            else:
                self.take([self._calls[i % len(self._calls)] for i in range(times)], logs=False)
            jax.block_until_ready(self.state)

        units = 1 if epoch else self._calls[0][1] - self._calls[0][0]
        return Work(run, self._program.bytes, units)


class Program:
    """A jitted function, compiled ahead of time for each number of steps a call."""

    def __init__(self, function: Any):
        """Wraps `function`, which is compiled at the first call."""
        self._function = function
        self._compiled: dict[int, Any] = {}

    def __call__(self, *arguments: Any, steps: int = 1) -> Any:
        """Calls the function; arguments with the same `steps` have the same shapes."""
        if steps not in self._compiled:
            self._compiled[steps] = self._function.lower(*arguments).compile()
        return self._compiled[steps](*arguments)

    def bytes(self) -> float:
        """Computes the bytes that the largest program needs beside its arguments, as reported by XLA."""
        sizes = [program.memory_analysis() for program in self._compiled.values()]
        return max(s.temp_size_in_bytes + s.output_size_in_bytes - s.alias_size_in_bytes for s in sizes)
