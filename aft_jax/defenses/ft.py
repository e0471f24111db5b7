"""FT: plain fine-tuning on clean images, the baseline for all other defenses.

A higher learning rate erases more of the backdoor and costs more clean accuracy. `defender.tune` chooses it.

Needs: the infected model and clean images. Costs: one training step a batch, for each learning rate.
"""

from functools import partial
from typing import NamedTuple

from aft_jax.data.augment import augment
from aft_jax.data.order import count_steps
from aft_jax.defenses.defender import DefenderData, DefenseSettings, Purified, start_training, tune
from aft_jax.training.loop import fit
from aft_jax.training.stage import Fitted, Phase, Run, TrainingStage
from aft_jax.training.steps import classification_step


class FtOptions(NamedTuple):
    """Section `ft` of the config, and section `fp`, for the fine-tuning after the pruning.

    Attributes:
        epochs: Length of the fine-tuning.
        learning_rates: Candidates, from the weakest to the strongest.
        schedule: 'constant' or 'cosine'.
        max_grad_norm: Largest norm of a gradient. 0 for no limit.
    """

    epochs: float
    learning_rates: tuple[float, ...]
    schedule: str
    max_grad_norm: float


def purify(run: Run, name: str, data: DefenderData, settings: DefenseSettings) -> Purified:
    """Fine-tunes the infected model on the clean images, augmented as in its training.

    Args:
        run: Experiment.
        name: Name of checkpoints and metrics.
        data: Infected model and clean images.
        settings: Settings with `FtOptions`.
    """

    def train(name: str, kept: DefenderData, learning_rate: float) -> Fitted:
        return fine_tune(run, name, kept, settings, epochs=settings.options.epochs, learning_rate=learning_rate)

    return tune(run, name, data, train, settings)


def fine_tune(
    run: Run, name: str, data: DefenderData, settings: DefenseSettings, *, epochs: float, learning_rate: float
) -> Fitted:
    """Fine-tunes the infected model with cross-entropy; also a part of other defenses.

    Args:
        run: Experiment.
        name: Name of checkpoints and metrics.
        data: Infected model and clean images.
        settings: Settings whose options have `schedule` and `max_grad_norm`.
        epochs: Passes over the images.
        learning_rate: Learning rate of the first step.
    """
    steps = count_steps(len(data.labels), epochs, settings.batch_size)
    return fit(run, fine_tuning_stage(name, data, settings, steps=steps, learning_rate=learning_rate))


def fine_tuning_stage(
    name: str, data: DefenderData, settings: DefenseSettings, *, steps: int, learning_rate: float
) -> TrainingStage:
    """Builds a fine-tuning of `steps` steps; arguments as of `fine_tune`."""
    before, optimiser = start_training(data, settings, steps, learning_rate)
    step = partial(
        classification_step,
        module=data.module,
        optimiser=optimiser,
        transform=lambda key, images, labels: (augment(key, images, settings.augment), labels),
    )
    return TrainingStage(name, before, [Phase(step, steps)], data.arrays, settings.batch_size)
