"""FT: plain fine-tuning on clean images, the baseline without which no purification means anything.

Needs: the suspect model and clean images. Costs: one training step a batch.
"""

from functools import partial

import ml_collections

from aft_jax.data.augment import augment
from aft_jax.data.batches import count_steps
from aft_jax.defenses.defender import Holdings, begin
from aft_jax.training.loop import Fitted, Phase, Run, fit
from aft_jax.training.steps import classification_step


def purify(run: Run, stage: str, holdings: Holdings, config: ml_collections.ConfigDict) -> Fitted:
    """Returns the suspect model fine-tuned with cross-entropy on the clean images, augmented as when it was trained.

    Args:
        run: The experiment.
        stage: The name of its checkpoints and metrics.
        holdings: The defender's.
        config: The resolved config; `config.ft` has epochs, learning_rate and schedule.
    """
    return fine_tune(run, stage, holdings, config.ft, config.ft.epochs, config)


def fine_tune(
    run: Run,
    stage: str,
    holdings: Holdings,
    options: ml_collections.ConfigDict,
    epochs: float,
    config: ml_collections.ConfigDict,
) -> Fitted:
    """Fine-tunes as a part of another defense: its teacher, or an end of its curve.

    Args:
        run: The experiment.
        stage: The name of this part's checkpoints and metrics.
        holdings: The defender's.
        options: The defense's own config: learning_rate and schedule.
        epochs: Of the holdings' images.
        config: The resolved config.

    Returns:
        The suspect model fine-tuned.
    """
    steps = count_steps(len(holdings.labels), epochs, config.batch_size)
    before, optimiser = begin(holdings, options, config.train, steps)
    step = partial(
        classification_step,
        module=holdings.module,
        optimiser=optimiser,
        transform=lambda key, images, labels: (augment(key, images, config.augment), labels),
    )
    return fit(run, stage, before, [Phase(step, steps)], holdings.arrays, config.batch_size)
