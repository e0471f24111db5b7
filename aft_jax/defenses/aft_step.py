"""A step of AFT (`aft_jax.defenses.aft`): adversarial examples of the model as it is, then a gradient step on them.

Two of them: with PGD, as in the paper, and with specs of changes (`aft_jax.adversarial.perturbations`).
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import struct

from aft_jax.adversarial.perturbations import Perturbation, PerturbationSpec, init_all, joint_attack
from aft_jax.adversarial.pgd import PGD, perturb
from aft_jax.data.augment import augment, cut_mix
from aft_jax.models import logits_function
from aft_jax.models.cpu_compilation import slow_in_loops
from aft_jax.training.state import Batch, Metrics, TrainState
from aft_jax.training.steps import accuracy, update


class Recipe(NamedTuple):
    """What a step of AFT is to do.

    Attributes:
        pgd: How adversarial examples are made; where there are specs only the number of steps is read.
        adversarial_share: Of a batch, replaced by adversarial examples; 0 in the clean stretch.
        distillation: Weight of the suspect model's predictions on clean images.
        augment: `config.augment`.
        adversarial_weight: Of the cross-entropy of adversarial examples.
        cutmix: Largest share of a clean image's area that another one takes; 0 leaves them alone.
        specs: Of changes, an equal part of the adversarial images each.
        renew_every: Steps after which shared changes begin anew.
    """

    pgd: PGD
    adversarial_share: float
    distillation: float
    augment: ml_collections.ConfigDict
    adversarial_weight: float = 1.0
    cutmix: float = 0.0
    specs: tuple[PerturbationSpec, ...] = ()
    renew_every: int = 1


@struct.dataclass
class SharedState:
    """The classifier, and the changes of the last step that the next goes on with (`PerturbationSpec.warm_started`)."""

    classifier: TrainState
    changes: tuple[Perturbation, ...]

    @property
    def step(self) -> jax.Array:
        """int32 scalar, steps taken."""
        return self.classifier.step

    @property
    def variables(self) -> dict:
        """The classifier's."""
        return self.classifier.variables


def begun(recipe: Recipe, key: jax.Array, image_shape: tuple[int, ...]) -> tuple[Perturbation, ...]:
    """Returns new changes, those that steps go on with, for images of shape (H, W, C)."""
    return _carried(recipe, init_all(recipe.specs, key, (0, *image_shape)))


def _carried(recipe: Recipe, changes: tuple[Perturbation, ...]) -> tuple[Perturbation, ...]:
    return tuple(change for family, change in zip(recipe.specs, changes, strict=True) if family.warm_started)


def aft_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    recipe: Recipe,
) -> tuple[TrainState, Metrics]:
    """One step of AFT: adversarial examples of the model as it is, then a gradient step on their true labels.

    Args:
        state: Before the step.
        batch: 'images' float32 [B, H, W, C] in [0, 1], 'labels' int32 [B], and 'fixed', the suspect's variables.
        key: PRNG key of this step.
        module: The classifier.
        optimiser: Its optimiser.
        recipe: What to do.

    Returns:
        The state after the step; metrics with 'fooled', the share of adversarial examples that left their label
        (in an adversarial step), and 'accuracy' on the images that have labels.
    """
    keys = _keys(key)
    images, clean = _prepared(batch, keys, recipe)
    if len(images):
        model, labels = logits_function(module, state.variables), batch['labels'][: len(images)]
        images = perturb(model, images, labels, keys.start, recipe.pgd, unroll=slow_in_loops(module))
    return _learn(state, images, clean, batch, keys.dropout, module=module, optimiser=optimiser, recipe=recipe)


def families_step(
    state: SharedState,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    recipe: Recipe,
) -> tuple[SharedState, Metrics]:
    """The same by specs of changes; shared ones go on from the last step. Arguments as of `aft_step`."""
    keys = _keys(key)
    images, clean = _prepared(batch, keys, recipe)
    carried = state.changes
    if len(images):
        fresh = init_all(recipe.specs, keys.start, images.shape)
        anew = state.step % recipe.renew_every == 0
        going_on = iter(jax.tree.map(lambda new, old: jnp.where(anew, new, old), _carried(recipe, fresh), carried))
        before = tuple(
            next(going_on) if family.warm_started else new for family, new in zip(recipe.specs, fresh, strict=True)
        )
        model, labels = logits_function(module, state.variables), batch['labels'][: len(images)]
        images, changes = joint_attack(
            model, images, labels, recipe.specs, before, recipe.pgd.steps, unroll=slow_in_loops(module)
        )
        carried = _carried(recipe, changes)
    learn = partial(_learn, module=module, optimiser=optimiser, recipe=recipe)
    classifier, metrics = learn(state.classifier, images, clean, batch, keys.dropout)
    return SharedState(classifier, carried), metrics


class _Keys(NamedTuple):
    augment: jax.Array
    start: jax.Array
    dropout: jax.Array
    mixtures: jax.Array


def _keys(key: jax.Array) -> _Keys:
    augment_key, start_key, dropout_key = jax.random.split(key, 3)
    return _Keys(augment_key, start_key, dropout_key, jax.random.fold_in(key, 0))


def _prepared(batch: Batch, keys: _Keys, recipe: Recipe) -> tuple[jax.Array, jax.Array]:
    """Returns the images to be made adversarial, and the clean ones as the model is to see them."""
    images = augment(keys.augment, batch['images'], recipe.augment)
    count = round(recipe.adversarial_share * len(images))
    clean = images[count:]
    if recipe.cutmix:
        clean = cut_mix(keys.mixtures, clean, recipe.cutmix)
    return images[:count], clean


def _learn(
    state: TrainState,
    examples: jax.Array,
    clean: jax.Array,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    recipe: Recipe,
) -> tuple[TrainState, Metrics]:
    """Takes the gradient step on adversarial examples and clean images, which come in the order of the labels."""
    count, labels = len(examples), batch['labels']
    examples = jax.lax.stop_gradient(examples)
    metrics: Metrics = {}
    if count:
        metrics['fooled'] = 1 - accuracy(logits_function(module, state.variables)(examples), labels[:count])
    distils = recipe.distillation > 0 and len(clean) > 0
    wanted = jax.nn.softmax(logits_function(module, batch['constants'])(clean)) if distils else None
    # What each image's cross-entropy counts; with a part of another one it has no label.
    weights = np.full(len(labels), 0.0 if recipe.cutmix else 1.0, np.float32)
    weights[:count] = recipe.adversarial_weight

    def loss(logits: jax.Array) -> jax.Array:
        value = jnp.mean(weights * optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        if wanted is not None:
            divergence = optax.kl_divergence(jax.nn.log_softmax(logits[count:]), wanted)
            value = value + recipe.distillation * divergence.mean()
        return value

    shown = jnp.concatenate([examples, clean])
    state, logits, step_metrics = update(state, shown, loss, key, module=module, optimiser=optimiser)
    labelled = count if recipe.cutmix else len(labels)
    if labelled:
        metrics['accuracy'] = accuracy(logits[:labelled], labels[:labelled])
    return state, metrics | step_metrics
