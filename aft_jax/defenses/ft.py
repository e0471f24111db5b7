"""FT: plain fine-tuning on clean images, the baseline without which no purification means anything.

The learning rate is its dial: a higher one erases more and costs more. `defender.tune` chooses among several.

Needs: the suspect model and clean images. Costs: one training step a batch, for each learning rate.
"""

from functools import partial

import ml_collections

from aft_jax.data.augment import augment
from aft_jax.data.order import count_steps
from aft_jax.defenses.defender import DefenderData, begin, tune
from aft_jax.training.loop import Fitted, Phase, Run, TrainingStage, fit
from aft_jax.training.steps import classification_step


def purify(run: Run, stage: str, data: DefenderData, config: ml_collections.ConfigDict) -> Fitted:
    """Returns the suspect model fine-tuned with cross-entropy on the clean images, augmented as when it was trained.

    Args:
        run: The experiment.
        stage: The name of its checkpoints and metrics.
        data: The defender's.
        config: The resolved config; `config.ft` has epochs, learning_rates, max_grad_norm and schedule.
    """
    options = config.ft

    def train(name: str, held: DefenderData, learning_rate: float) -> Fitted:
        return fine_tune(run, name, held, options, options.epochs, config, learning_rate)

    return tune(run, stage, data, options.learning_rates, train, config.tuning)


def fine_tune(
    run: Run,
    stage: str,
    data: DefenderData,
    options: ml_collections.ConfigDict,
    epochs: float,
    config: ml_collections.ConfigDict,
    learning_rate: float,
) -> Fitted:
    """Fine-tunes as a part of another defense: its teacher, or an end of its curve.

    Args:
        run: The experiment.
        stage: The name of this part's checkpoints and metrics.
        data: The defender's.
        options: The defense's own config: schedule and max_grad_norm.
        epochs: Of the data' images.
        config: The resolved config.
        learning_rate: At the beginning.

    Returns:
        The suspect model fine-tuned.
    """
    steps = count_steps(len(data.labels), epochs, config.batch_size)
    before, optimiser = begin(data, options, config.train, steps, learning_rate)
    step = partial(
        classification_step,
        module=data.module,
        optimiser=optimiser,
        transform=lambda key, images, labels: (augment(key, images, config.augment), labels),
    )
    return fit(run, TrainingStage(stage, before, [Phase(step, steps)], data.arrays, config.batch_size))
