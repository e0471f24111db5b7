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
    steps = count_steps(len(holdings.labels), config.ft.epochs, config.batch_size)
    before, optimiser = begin(holdings, config.ft, config.train, steps)
    step = partial(
        classification_step,
        module=holdings.module,
        optimiser=optimiser,
        transform=lambda key, images, labels: (augment(key, images, config.augment), labels),
    )
    return fit(run, stage, before, [Phase(step, steps)], holdings.arrays, config.batch_size)
