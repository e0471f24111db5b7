"""FP: fine-pruning (Liu et al., "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", 2018).

A backdoor is said to live in channels that clean images leave asleep. The channels of the last feature map are pruned,
the least active first, as long as the held-out clean images allow it; fine-tuning then mends what that broke:

    activity(c) = mean over clean images and positions of |what the next dense layer reads of channel c|

For a map that a ReLU made this is the paper's mean activation; our networks also have maps that may be negative, where
the channel that sleeps is the one near zero, not the one far below it. To prune a channel is to set its rows of the
layer that reads it to zero, where they stay, so that a BatchNorm in between (`model.final_norm`) cannot wake it again.
The usual code stops pruning by the accuracy on the test set, which a defender does not have; here the rule is
`defender.strongest`, and the learning rate of the fine-tuning is chosen by it as well.

Needs: the suspect model and clean images. Costs: as FT, after one prediction of the held-out images for each channel
from the last feature map on.
"""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import struct

from aft_jax.data.augment import augment
from aft_jax.data.order import count_steps
from aft_jax.defenses.defender import DefenderData, begin, choose, hold_out, strongest
from aft_jax.models.channel_pruning import head_inputs, masked_logits, reader, without
from aft_jax.training.loop import Fitted, Phase, Run, TrainingStage, fit
from aft_jax.training.prediction import Batched
from aft_jax.training.state import Batch, Metrics, TrainState
from aft_jax.training.steps import classification_step

# Candidates that are tried in one call; the network below the last feature map runs once for all of them.
CANDIDATES_PER_CALL = 32


@struct.dataclass
class PrunedState:
    """A classifier in training whose pruned channels stay so.

    Attributes:
        classifier: Its state.
        kept: float32 [C], 0 for the pruned channels of the last feature map and 1 for the others. It is saved with the
            rest, so that a resumed run goes on with the same ones.
    """

    classifier: TrainState
    kept: jax.Array

    @property
    def step(self) -> jax.Array:
        """int32 scalar, steps taken."""
        return self.classifier.step

    @property
    def variables(self) -> dict:
        """The classifier's."""
        return self.classifier.variables


def purify(run: Run, stage: str, data: DefenderData, config: ml_collections.ConfigDict) -> Fitted:
    """Returns the suspect model pruned and fine-tuned on the clean images that are not held out.

    Args:
        run: The experiment.
        stage: The name of its checkpoints and metrics.
        data: The defender's.
        config: The resolved config; `config.fp` has epochs, learning_rates, max_grad_norm and schedule.
    """
    started = time.monotonic()
    training, held = hold_out(data, config.tuning.held_out_share, run.seed)
    name = reader(data.module, data.variables, data.images.shape[1:])
    candidates = least_active_first(activity(run, training, name))
    accuracies = held_out_accuracies(run, held, name, candidates)
    kept = candidates[strongest(accuracies, config.tuning.budget)]
    pruning_seconds = time.monotonic() - started

    def fine_tuned(learning_rate: float) -> Fitted:
        steps = count_steps(len(training.labels), config.fp.epochs, config.batch_size)
        before, optimiser = begin(training, config.fp, config.train, steps, learning_rate)
        pruned = replace(before, params=without(before.params, name, jnp.asarray(kept)))
        step = partial(
            fine_tuning_step, name=name, module=data.module, optimiser=optimiser, augmentation=config.augment
        )
        begun = PrunedState(pruned, jnp.asarray(kept))
        name_of_stage = f'{stage}/{float(learning_rate)}'
        return fit(run, TrainingStage(name_of_stage, begun, [Phase(step, steps)], training.arrays, config.batch_size))

    fitted = choose(run, held, [fine_tuned(rate) for rate in config.fp.learning_rates], config.tuning)
    return fitted._replace(seconds=fitted.seconds + pruning_seconds)


def activity(run: Run, training: DefenderData, name: str) -> np.ndarray:
    """Returns how active each channel of the suspect's last feature map is: float64 [C]; see the top of this file.

    Args:
        run: The experiment.
        training: The data that are not held out.
        name: Of the map's reader.
    """

    def of_images(variables: Any, images: jax.Array) -> jax.Array:
        return jnp.abs(head_inputs(training.module, name, variables, images)).mean(axis=1)

    measure = Batched(of_images, training.module, run.mesh, run.options.eval_batch_size)
    return measure(training.variables, training.images).mean(axis=0, dtype=np.float64)


def least_active_first(activities: np.ndarray) -> np.ndarray:
    """Returns what is kept when 0, 1, ... C - 1 channels are pruned: float32 [C, C], a candidate a row.

    Args:
        activities: [C].
    """
    rank = np.argsort(np.argsort(activities, kind='stable'))
    return (rank >= np.arange(len(rank))[:, None]).astype(np.float32)


def held_out_accuracies(run: Run, held: DefenderData, name: str, candidates: np.ndarray) -> list[float]:
    """Returns the clean accuracy of the suspect pruned in each way, without any training.

    Args:
        run: The experiment.
        held: The held-out part of the data.
        name: Of the reader of the last feature map.
        candidates: float32 [n, C], rows of 1 for what is kept and 0 for what is not.
    """

    def classes(given: Any, images: jax.Array) -> jax.Array:
        logits = partial(masked_logits, held.module, name, given['variables'], images)
        return jax.vmap(logits, out_axes=1)(given['candidates']).argmax(axis=-1).astype(jnp.int32)

    predict = Batched(classes, held.module, run.mesh, run.options.eval_batch_size)
    accuracies = []
    for first in range(0, len(candidates), CANDIDATES_PER_CALL):
        part = candidates[first : first + CANDIDATES_PER_CALL]
        predicted = predict({'variables': held.variables, 'candidates': part}, held.images)
        accuracies += np.mean(predicted == held.labels[:, None], axis=0).tolist()
    return accuracies


def fine_tuning_step(
    state: PrunedState,
    batch: Batch,
    key: jax.Array,
    *,
    name: str,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    augmentation: ml_collections.ConfigDict,
) -> tuple[PrunedState, Metrics]:
    """Cross-entropy on an augmented batch, after which pruned channels are set to zero again.

    Args:
        state: Before the step.
        batch: 'images' float32 [B, H, W, C] in [0, 1] and 'labels' int32 [B].
        key: PRNG key of this step.
        name: Of the reader of the last feature map.
        module: The classifier.
        optimiser: Its optimiser.
        augmentation: `config.augment`.

    Returns:
        The state after the step; metrics with 'pruned_share', that of the last feature map's channels.
    """
    classifier, metrics = classification_step(
        state.classifier,
        batch,
        key,
        module=module,
        optimiser=optimiser,
        transform=lambda key, images, labels: (augment(key, images, augmentation), labels),
    )
    pruned = replace(classifier, params=without(classifier.params, name, state.kept))
    return replace(state, classifier=pruned), metrics | {'pruned_share': 1 - state.kept.mean()}
