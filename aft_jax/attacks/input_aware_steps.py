"""The training steps of the input-aware attack (`aft_jax.attacks.input_aware` has the losses)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from aft_jax.attacks.input_aware import Networks, diversity, evaluate, sharpen
from aft_jax.attacks.poison import PoisoningOptions, cross_count
from aft_jax.attacks.training import AttackSettings
from aft_jax.data.augment import AugmentOptions, augment
from aft_jax.training.state import Batch, Metrics, TrainState, WrapsClassifier
from aft_jax.training.steps import accuracy, advance, apply_training, cross_entropy, update


@struct.dataclass
class JointState(WrapsClassifier):
    """A classifier and the generator, trained together."""

    generator: TrainState


def mask_step(
    current: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    networks: Networks,
    optimiser: optax.GradientTransformation,
    settings: AttackSettings,
) -> tuple[TrainState, Metrics]:
    """Takes a step of stage 1: the mask network alone.

    Args:
        current: State of the mask network.
        batch: 'images' float32 [B, H, W, C] in [0, 1], and the same in batch['second'].
        key: PRNG key of this step.
        networks: Both networks.
        optimiser: Optimiser of the mask network.
        settings: Settings of the training.

    Returns:
        The state after the step; metrics with 'mask_area', the mean of the masks, and 'diversity'.
    """
    options = settings.input_aware
    images, others = _augmented(key, batch, settings.augment)
    count = len(images)
    std = jnp.broadcast_to(jnp.asarray(settings.pixel_std, jnp.float32), images.shape[-1:])[None, None, None]

    def terms(maps: jax.Array) -> tuple[jax.Array, jax.Array]:
        masks = sharpen(maps)
        return masks, diversity(images / std, others / std, masks[:count], masks[count:])

    def loss(maps: jax.Array) -> jax.Array:
        masks, diverse = terms(maps)
        excess = jnp.mean(jax.nn.relu(masks - options.mask_density))
        return options.mask_weight * excess + options.mask_diversity_weight * diverse

    both = jnp.concatenate([images, others])
    current, maps, metrics = update(current, both, loss, key, module=networks.mask, optimiser=optimiser)
    masks, diverse = terms(maps)
    return current, metrics | {'mask_area': masks.mean(), 'diversity': diverse}


class SplitBatch(NamedTuple):
    """A batch of stage 2 that begins with attacked images; cross images and clean ones follow.

    Attributes:
        images: float32 [B, H, W, C] in [0, 1], without triggers.
        labels: int32 [B], target labels for attacked images and true labels for the others.
        sources: float32 [changed, H, W, C], source images of the triggers.
        attacked: Number of attacked images.
        changed: Number of attacked and cross images.
    """

    images: jax.Array
    labels: jax.Array
    sources: jax.Array
    attacked: int
    changed: int

    def paste(self, patterns: jax.Array, masks: jax.Array) -> jax.Array:
        """Pastes patterns [changed, H, W, C] on the first images, where masks [changed, H, W, 1] are 1."""
        images = self.images[: self.changed]
        return jnp.concatenate([images + (patterns - images) * masks, self.images[self.changed :]])

    def diversity(self, patterns: jax.Array) -> jax.Array:
        """Computes the diversity of the patterns [changed, H, W, C], over pairs of an attacked and a cross image."""
        pairs = min(self.attacked, self.changed - self.attacked)
        first, second = slice(pairs), slice(self.attacked, self.attacked + pairs)
        return diversity(self.sources[first], self.sources[second], patterns[first], patterns[second])


def split_batch(
    images: jax.Array, others: jax.Array, labels: jax.Array, target_map: np.ndarray, options: PoisoningOptions
) -> SplitBatch:
    """Splits a batch into attacked, cross and clean images.

    Args:
        images: float32 [B, H, W, C] in [0, 1].
        others: float32 [B, H, W, C], source images for the cross mode.
        labels: int32 [B], true labels.
        target_map: int32 [K], target label of each true class.
        options: Share of attacked images and number of cross images.
    """
    attacked = round(options.poisoned_share * len(labels))
    changed = min(attacked + cross_count(attacked, options.cross_ratio), len(labels))
    labels = jnp.concatenate([jnp.asarray(target_map)[labels[:attacked]], labels[attacked:]])
    sources = jnp.concatenate([images[:attacked], others[attacked:changed]])
    return SplitBatch(images, labels, sources, attacked, changed)


def joint_step(
    current: JointState,
    batch: Batch,
    key: jax.Array,
    *,
    networks: Networks,
    module: nn.Module,
    optimisers: tuple[optax.GradientTransformation, optax.GradientTransformation],
    target_map: np.ndarray,
    settings: AttackSettings,
) -> tuple[JointState, Metrics]:
    """Takes a step of stage 2: classifier and generator on one loss.

    The generator makes the patterns of attacked and cross images in one pass, so that its batch statistics are those
    of both.

    Args:
        current: States of both.
        batch: 'images' float32 [B, H, W, C] in [0, 1] and 'labels' int32 [B], the same in batch['second'], and the
            variables of the mask network in batch['constants'].
        key: PRNG key of this step.
        networks: Both networks of the attack.
        module: Classifier.
        optimisers: Optimisers of the classifier and of the generator.
        target_map: int32 [K], target label of each true class.
        settings: Settings of the training.

    Returns:
        The states after the step; metrics with 'diversity' and the accuracies on attacked images (against the target
        label), on cross images and on clean ones.
    """
    augment_key, dropout_key = jax.random.split(key)
    images, others = _augmented(augment_key, batch, settings.augment)
    split = split_batch(images, others, batch['labels'], target_map, settings.poisoning)
    masks = sharpen(evaluate(networks.mask, batch['constants'], split.sources))

    def objective(params):
        patterns, generator_stats = apply_training(
            networks.generator, current.generator, params['generator'], split.sources
        )
        inputs = split.paste(patterns, masks)
        logits, classifier_stats = apply_training(module, current.classifier, params['classifier'], inputs, dropout_key)
        diverse = split.diversity(patterns)
        loss = cross_entropy(logits, split.labels) + settings.input_aware.diversity_weight * diverse
        return loss, (logits, diverse, {'generator': generator_stats, 'classifier': classifier_stats})

    params = {'generator': current.generator.params, 'classifier': current.classifier.params}
    (loss, (logits, diverse, stats)), gradient = jax.value_and_grad(objective, has_aux=True)(params)
    after = JointState(
        classifier=advance(current.classifier, gradient['classifier'], stats['classifier'], optimisers[0]),
        generator=advance(current.generator, gradient['generator'], stats['generator'], optimisers[1]),
    )
    parts = {
        'attacked_accuracy': slice(split.attacked),
        'cross_accuracy': slice(split.attacked, split.changed),
        'accuracy': slice(split.changed, None),
    }
    return after, {
        'loss': loss,
        'grad_norm': optax.tree.norm(gradient['classifier']),
        'generator_grad_norm': optax.tree.norm(gradient['generator']),
        'diversity': diverse,
    } | {name: accuracy(logits[part], split.labels[part]) for name, part in parts.items()}


def _augmented(key: jax.Array, batch: Batch, options: AugmentOptions) -> tuple[jax.Array, jax.Array]:
    """Augments the images of both streams."""
    key, other_key = jax.random.split(key)
    images = augment(key, batch['images'], options)
    return images, augment(other_key, batch['second']['images'], options)
