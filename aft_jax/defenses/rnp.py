"""RNP: reconstructive neuron pruning (Li et al., "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023,
arXiv 2305.14876).

An infected model that unlearns clean images keeps its backdoor. Channels that must shrink so that it recovers the clean
images are those of the backdoor:

1. Unlearning: SGD up the cross-entropy, until the training accuracy of an epoch is at most `stop_accuracy`.
2. Recovering: the unlearned weights stay, and each channel of a BatchNorm has a mask m in [0, 1] on its scale w:

       min over m of  recover_weight CE(m w)

3. Pruning: in the infected model, the scales of all channels with m below a threshold become 0. Biases stay.

Both trainings normalise by batch statistics. Running statistics stay those of the infected model. The paper takes 1 %
of CIFAR-10, with SGD at .01 for at most 20 epochs (a tenth of it after 10) and at .2 for 20 epochs. Both public codes
clip a gradient before it is computed, so they clip nothing, and nothing is clipped here. The official code prints the
ASR of every threshold on the test set, which a defender does not have. Here `defender.strongest` chooses the threshold,
as for ANP. Steps after the end of the unlearning change nothing. Networks without BatchNorm have nothing to prune.

Needs: the infected model and clean images. Costs: one training step a batch, in at most 20 and in 20 epochs.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from aft_jax.data.augment import AugmentOptions, augment
from aft_jax.data.order import count_steps
from aft_jax.defenses.anp import MaskState, init_masks, prune_strongest, scaled, training_logits
from aft_jax.defenses.defender import DefenderData, DefenseSettings, Purified, hold_out
from aft_jax.training import state as training_state
from aft_jax.training.loop import fit
from aft_jax.training.optimiser import sgd
from aft_jax.training.stage import Fitted, Phase, Run, TrainingStage
from aft_jax.training.state import Batch, Metrics, WrapsClassifier
from aft_jax.training.steps import accuracy, cross_entropy, update

# Epochs after which the learning rate of the unlearning is a tenth.
DROP_AFTER = 10


class RnpOptions(NamedTuple):
    """Section `rnp` of the config.

    Attributes:
        unlearning_epochs: Largest length of the unlearning.
        unlearning_rate: Learning rate of the unlearning.
        stop_accuracy: Training accuracy of an epoch at which the unlearning ends.
        recovering_epochs: Length of the masks' training.
        recovering_rate: Learning rate of the masks.
        recover_weight: Weight of the cross-entropy in the masks' training.
    """

    unlearning_epochs: int
    unlearning_rate: float
    stop_accuracy: float
    recovering_epochs: int
    recovering_rate: float
    recover_weight: float


@struct.dataclass
class UnlearnedState(WrapsClassifier):
    """A classifier that unlearns clean images.

    Attributes:
        classifier: State of the classifier. Its `step` counts on after the end of the unlearning.
        accuracies: float32 scalar, sum of the accuracies of the batches of this epoch.
        ended: Whether the unlearning has ended.
    """

    accuracies: jax.Array
    ended: jax.Array


def purify(run: Run, name: str, data: DefenderData, settings: DefenseSettings) -> Purified:
    """Removes the channels of the infected model that hinder the recovery of clean images.

    Args:
        run: Experiment.
        name: Name of the defense. The two trainings and the record of what was pruned have names of their own below it.
        data: Infected model and clean images.
        settings: Settings with `RnpOptions`.
    """
    options: RnpOptions = settings.options
    kept, held = hold_out(data, settings.tuning.held_out_share, run.seed)
    unlearned = fit_unlearned(run, f'{name}/unlearn', kept, settings)
    steps = count_steps(len(kept.labels), options.recovering_epochs, settings.batch_size)
    optimiser = sgd(options.recovering_rate, 'constant', steps, momentum=settings.train.momentum, weight_decay=0.0)
    step = partial(
        recovering_step,
        module=data.module,
        optimiser=optimiser,
        weight=options.recover_weight,
        augmentation=settings.augment,
    )
    stage = TrainingStage(
        name=f'{name}/recover',
        state=init_masks(data.variables, optimiser),
        phases=[Phase(step, steps)],
        arrays=kept.arrays,
        batch_size=settings.batch_size,
        constants=data.variables | {'params': unlearned.state.classifier.params},
        trains_model=False,
    )
    recovered = fit(run, stage)
    masks = jax.device_get(recovered.state.masks)
    variables, record, seconds = prune_strongest(run, held, masks, settings.tuning)
    run.writer.rewind(f'{name}/pruned', -1)
    run.writer.write(f'{name}/pruned', steps, record)
    return Purified(variables, unlearned.seconds + recovered.seconds + seconds)


def fit_unlearned(run: Run, name: str, data: DefenderData, settings: DefenseSettings) -> Fitted:
    """Trains the infected model up the cross-entropy of the clean images.

    Args:
        run: Experiment.
        name: Name of checkpoints and metrics.
        data: Infected model and clean images.
        settings: Settings with `RnpOptions`.
    """
    options: RnpOptions = settings.options
    epoch = count_steps(len(data.labels), 1, settings.batch_size)
    rate = lambda count: jnp.where(count < DROP_AFTER * epoch, 1.0, 0.1) * options.unlearning_rate  # noqa: E731
    optimiser = optax.chain(
        optax.add_decayed_weights(settings.train.weight_decay), optax.sgd(rate, momentum=settings.train.momentum)
    )
    step = partial(
        unlearning_step,
        module=data.module,
        optimiser=optimiser,
        epoch=epoch,
        stop_accuracy=options.stop_accuracy,
        augmentation=settings.augment,
    )
    start = UnlearnedState(training_state.create(data.variables, optimiser), jnp.zeros(()), jnp.zeros((), bool))
    phases = [Phase(step, epoch * options.unlearning_epochs)]
    # The unlearned model is no candidate, so no evaluation hook of the run watches it.
    return fit(run, TrainingStage(name, start, phases, data.arrays, settings.batch_size, trains_model=False))


def unlearning_step(
    state: UnlearnedState,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    epoch: int,
    stop_accuracy: float,
    augmentation: AugmentOptions,
) -> tuple[UnlearnedState, Metrics]:
    """Takes a step up the cross-entropy; none once the unlearning has ended.

    Args:
        state: State before the step.
        batch: 'images' float32 [B, H, W, C] in [0, 1] and 'labels' int32 [B].
        key: PRNG key of this step.
        module: Classifier.
        optimiser: Optimiser of the classifier.
        epoch: Steps of an epoch.
        stop_accuracy: Training accuracy of an epoch at which the unlearning ends.
        augmentation: Options of `augment`.

    Returns:
        The state after the step; metrics with 'accuracy' and 'ended', 1 once the unlearning has ended.
    """
    augment_key, dropout_key = jax.random.split(key)
    images, labels = augment(augment_key, batch['images'], augmentation), batch['labels']
    moved, logits, metrics = update(
        state.classifier, images, lambda z: -cross_entropy(z, labels), dropout_key, module=module, optimiser=optimiser
    )
    stays = replace(state.classifier, step=moved.step)
    classifier = jax.tree.map(lambda old, new: jnp.where(state.ended, old, new), stays, moved)
    share = accuracy(logits, labels)
    accuracies = state.accuracies + share
    complete = moved.step % epoch == 0
    ended = state.ended | (complete & (accuracies / epoch <= stop_accuracy))
    metrics |= {'accuracy': share, 'ended': ended.astype(jnp.float32)}
    return UnlearnedState(classifier, jnp.where(complete, 0.0, accuracies), ended), metrics


def recovering_step(
    state: MaskState,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    weight: float,
    augmentation: AugmentOptions,
) -> tuple[MaskState, Metrics]:
    """Takes a step of the masks down the cross-entropy of the masked, unlearned model.

    Args:
        state: Masks before the step.
        batch: 'images' float32 [B, H, W, C] in [0, 1], 'labels' int32 [B], and 'constants', the unlearned parameters
            with the infected model's statistics.
        key: PRNG key of this step.
        module: Classifier.
        optimiser: Optimiser of the masks.
        weight: Weight of the cross-entropy.
        augmentation: Options of `augment`.

    Returns:
        The state after the step; metrics with 'mask', the mean of all masks.
    """
    augment_key, dropout_key = jax.random.split(key)
    images, model = augment(augment_key, batch['images'], augmentation), batch['constants']

    def objective(masks):
        params = scaled(model['params'], masks, {})
        return weight * cross_entropy(training_logits(module, model, params, images, dropout_key), batch['labels'])

    loss, gradient = jax.value_and_grad(objective)(state.masks)
    updates, opt_state = optimiser.update(gradient, state.opt_state, state.masks)
    masks = jax.tree.map(lambda m, u: jnp.clip(m + u, 0.0, 1.0), state.masks, updates)
    metrics = {'loss': loss, 'mask': jnp.concatenate(jax.tree.leaves(masks)).mean()}
    return MaskState(state.step + 1, masks, opt_state), metrics
