"""FP: fine-pruning (Liu et al., "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", 2018).

A backdoor is assumed to use channels that clean images do not activate. The channels of the last feature map are
pruned, the least active first, as long as the held-out clean images allow it. Fine-tuning then repairs the damage:

    activity(c) = mean over clean images and positions of |input of the next dense layer from channel c|

For a map after a ReLU this is the paper's mean activation. Our networks also have maps with negative values; there an
inactive channel is one near zero. Pruning a channel sets its rows in the kernel of the next dense layer to zero, and
they stay zero. So a BatchNorm in between (`model.final_norm`) cannot activate the channel again.

The usual code stops pruning by the accuracy on the test set, which a defender does not have. Here `defender.strongest`
chooses the number of channels, and also the learning rate of the fine-tuning.

Needs: the infected model and clean images. Costs: those of FT, and one prediction of the held-out images for each
channel, from the last feature map on.
"""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from aft_jax.data.order import count_steps
from aft_jax.defenses.defender import DefenderData, DefenseSettings, Purified, choose_fitted, hold_out, strongest
from aft_jax.defenses.ft import FtOptions, fine_tuning_stage
from aft_jax.models.channel_pruning import first_dense, head_inputs, masked_logits, prune_channels
from aft_jax.training.loop import fit
from aft_jax.training.prediction import BatchedFunction
from aft_jax.training.stage import Fitted, Phase, Run
from aft_jax.training.state import Batch, Metrics, Step, TrainState, WrapsClassifier

# Candidates in one compiled call. The network up to the last feature map runs once for all of them.
CANDIDATES_PER_CALL = 32


@struct.dataclass
class PrunedState(WrapsClassifier):
    """A classifier in training whose pruned channels stay pruned.

    Attributes:
        classifier: State of the classifier.
        kept: float32 [C], 0 for the pruned channels of the last feature map and 1 for the others. Checkpoints contain
            it, so that a resumed run has the same pruned channels.
    """

    kept: jax.Array


def purify(run: Run, name: str, data: DefenderData, settings: DefenseSettings) -> Purified:
    """Prunes the infected model, and fine-tunes it on the clean images that are not held out.

    Args:
        run: Experiment.
        name: Name of the defense. The fine-tuning with each learning rate has a name of its own below it.
        data: Infected model and clean images.
        settings: Settings with `FtOptions`.
    """
    options: FtOptions = settings.options
    started = time.monotonic()
    training, held = hold_out(data, settings.tuning.held_out_share, run.seed)
    layer = first_dense(data.module, data.variables, data.images.shape[1:])
    candidates = least_active_first(activity(run, training, layer))
    accuracies = held_out_accuracies(run, held, layer, candidates)
    kept = jnp.asarray(candidates[strongest(accuracies, settings.tuning.budget)])
    pruning_seconds = time.monotonic() - started
    steps = count_steps(len(training.labels), options.epochs, settings.batch_size)

    def fine_tune_pruned(rate: float) -> Fitted:
        stage = fine_tuning_stage(f'{name}/{float(rate)}', training, settings, steps=steps, learning_rate=rate)
        pruned = PrunedState(prune_classifier(stage.state, layer, kept), kept)
        step = partial(pruned_step, step=stage.phases[0].step, layer=layer)
        return fit(run, stage._replace(state=pruned, phases=[Phase(step, steps)]))

    fitted = [fine_tune_pruned(rate) for rate in options.learning_rates]
    purified = choose_fitted(run, held, fitted, settings.tuning)
    return purified._replace(seconds=purified.seconds + pruning_seconds)


def activity(run: Run, training: DefenderData, layer: str) -> np.ndarray:
    """Measures the activity of each channel of the infected model's last feature map: float64 [C]; see above.

    Args:
        run: Experiment.
        training: Infected model, and the images that are not held out.
        layer: Name of the first dense layer.
    """

    def image_activity(variables: Any, images: jax.Array) -> jax.Array:
        return jnp.abs(head_inputs(training.module, layer, variables, images)).mean(axis=1)

    measure = BatchedFunction(image_activity, training.module, run.mesh, run.options.eval_batch_size)
    return measure(training.variables, training.images).mean(axis=0, dtype=np.float64)


def least_active_first(activities: np.ndarray) -> np.ndarray:
    """Builds the candidates, which prune 0, 1, ... C - 1 channels: float32 [C, C], rows with 1 for kept channels.

    Args:
        activities: Activity of each channel, [C].
    """
    rank = np.argsort(np.argsort(activities, kind='stable'))
    return (rank >= np.arange(len(rank))[:, None]).astype(np.float32)


def held_out_accuracies(run: Run, held: DefenderData, layer: str, candidates: np.ndarray) -> list[float]:
    """Measures the clean accuracy of each candidate before fine-tuning.

    Args:
        run: Experiment.
        held: Infected model and held-out images.
        layer: Name of the first dense layer.
        candidates: float32 [n, C], 1 for kept channels and 0 for pruned ones.
    """

    def classes(inputs: Any, images: jax.Array) -> jax.Array:
        logits = partial(masked_logits, held.module, layer, inputs['variables'], images)
        return jax.vmap(logits, out_axes=1)(inputs['candidates']).argmax(axis=-1).astype(jnp.int32)

    predict = BatchedFunction(classes, held.module, run.mesh, run.options.eval_batch_size)
    accuracies = []
    for first in range(0, len(candidates), CANDIDATES_PER_CALL):
        part = candidates[first : first + CANDIDATES_PER_CALL]
        predicted = predict({'variables': held.variables, 'candidates': part}, held.images)
        accuracies += np.mean(predicted == held.labels[:, None], axis=0).tolist()
    return accuracies


def prune_classifier(classifier: TrainState, layer: str, kept: jax.Array) -> TrainState:
    """Prunes the channels that `kept` marks with 0."""
    return replace(classifier, params=prune_channels(classifier.params, layer, kept))


def pruned_step(
    state: PrunedState, batch: Batch, key: jax.Array, *, step: Step, layer: str
) -> tuple[PrunedState, Metrics]:
    """Takes a step of fine-tuning, and prunes the same channels again.

    Args:
        state: State before the step.
        batch: Batch of `step`.
        key: PRNG key of this step.
        step: Step of the classifier.
        layer: Name of the first dense layer.

    Returns:
        The state after the step; metrics with 'pruned_share' of the last feature map's channels.
    """
    classifier, metrics = step(state.classifier, batch, key)
    pruned = replace(state, classifier=prune_classifier(classifier, layer, state.kept))
    return pruned, metrics | {'pruned_share': 1 - state.kept.mean()}
