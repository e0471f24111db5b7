"""AFT: adversarial fine-tuning ("Adversarial Fine-tuning for Backdoor Defense", arXiv 2202.06312).

Untargeted adversarial examples of an infected model behave like its triggered images, so that fine-tuning on them
with their true labels breaks the backdoor. Two stretches:

    adversarial   a share of each batch is replaced by PGD examples of the model as it is at that step
    clean         clean images alone

On clean images the loss may hold the model to what the suspect model predicts for them:

    loss = adversarial_weight * sum over adversarial images of CE / B + sum over clean images of CE / B
         + distillation * mean over clean images of KL(suspect || model)

With cutmix the clean images have a rectangle of another one, and so neither label nor CE: the suspect's predictions
on them tell far more of what it knows than those on a few thousand images. (Mixtures that add two images up, as mixup
does, do not serve: they are blurred, and the suspect's predictions on them carry WaNet's backdoor over.) Norm 'both'
takes half of the adversarial examples from an Linf ball and half from an L2 ball, which holds small triggers of strong
contrast as well.

Needs: the suspect model and clean images. Costs: `pgd_steps` further input gradients for each adversarial image.
"""

import math
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from aft_jax.adversarial import PGD, Logits, perturb
from aft_jax.data.augment import augment
from aft_jax.data.batches import count_steps
from aft_jax.defenses.defender import Holdings, begin
from aft_jax.models import logits_function
from aft_jax.training.loop import Fitted, Phase, Run, fit
from aft_jax.training.state import Batch, Metrics, TrainState
from aft_jax.training.steps import accuracy, update


class Recipe(NamedTuple):
    """What a step of AFT is to do.

    Attributes:
        attacks: How adversarial examples are made; each makes an equal part of them.
        adversarial_share: Of a batch, replaced by adversarial examples; 0 in the clean stretch.
        distillation: Weight of the suspect model's predictions on clean images.
        augment: `config.augment`.
        adversarial_weight: Of the cross-entropy of adversarial examples.
        cutmix: Largest share of a clean image's area that another one takes; 0 leaves them alone.
    """

    attacks: tuple[PGD, ...]
    adversarial_share: float
    distillation: float
    augment: ml_collections.ConfigDict
    adversarial_weight: float = 1.0
    cutmix: float = 0.0


def purify(run: Run, stage: str, holdings: Holdings, config: ml_collections.ConfigDict, section: str = 'aft') -> Fitted:
    """Returns the suspect model after adversarial fine-tuning on the clean images.

    Args:
        run: The experiment.
        stage: The name of its checkpoints and metrics.
        holdings: The defender's.
        config: The resolved config.
        section: Of the config, where the recipe is.
    """
    options = config[section]
    size = len(holdings.labels)
    steps = count_steps(size, options.epochs, config.batch_size)
    adversarial_steps = min(steps, count_steps(size, options.adversarial_epochs, config.batch_size))
    before, optimiser = begin(holdings, options, config.train, steps)
    recipe = recipe_of(options, config.augment, holdings.images.shape[1:])
    bound = partial(aft_step, module=holdings.module, optimiser=optimiser)
    phases = [
        Phase(partial(bound, recipe=recipe), adversarial_steps),
        Phase(partial(bound, recipe=recipe._replace(adversarial_share=0.0)), steps),
    ]
    return fit(run, stage, before, phases, holdings.arrays, config.batch_size, fixed=holdings.variables)


def recipe_of(
    options: ml_collections.ConfigDict, augmentation: ml_collections.ConfigDict, image_shape: tuple[int, ...]
) -> Recipe:
    """Returns what an adversarial step is to do.

    Args:
        options: `config.aft`, resolved.
        augmentation: `config.augment`.
        image_shape: (H, W, C).
    """
    return Recipe(
        attacks=attacks_of(options, image_shape),
        adversarial_share=options.adversarial_share,
        distillation=options.distillation,
        augment=augmentation,
        adversarial_weight=options.adversarial_weight,
        cutmix=options.cutmix,
    )


def attacks_of(options: ml_collections.ConfigDict, image_shape: tuple[int, ...]) -> tuple[PGD, ...]:
    """Returns the PGDs that `config.aft` asks for: one, or two for the norm 'both'.

    Args:
        options: `config.aft`.
        image_shape: (H, W, C), by which a root mean square becomes an L2 radius.
    """
    pgd = PGD(
        eps=options.eps,
        step_size=options.step_size,
        steps=options.pgd_steps,
        norm='linf' if options.norm == 'both' else options.norm,
        random_start=options.random_start,
        clip=options.clip,
    )
    if options.norm != 'both':
        return (pgd,)
    length = math.sqrt(math.prod(image_shape))
    return pgd, pgd._replace(norm='l2', eps=options.rms_eps * length, step_size=options.rms_step_size * length)


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
    augment_key, start_key, dropout_key = jax.random.split(key, 3)
    labels = batch['labels']
    images = augment(augment_key, batch['images'], recipe.augment)
    count = round(recipe.adversarial_share * len(labels))
    clean = images[count:]
    if recipe.cutmix:
        clean = cut_mix(jax.random.fold_in(key, 0), clean, recipe.cutmix)
    metrics: Metrics = {}
    examples = images[:count]
    if count:
        model = logits_function(module, state.variables)
        examples = jax.lax.stop_gradient(adversarial(model, examples, labels[:count], start_key, recipe.attacks))
        metrics['fooled'] = 1 - accuracy(model(examples), labels[:count])
    distils = recipe.distillation > 0 and len(clean) > 0
    wanted = jax.nn.softmax(logits_function(module, batch['fixed'])(clean)) if distils else None
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
    state, logits, step_metrics = update(state, shown, loss, dropout_key, module=module, optimiser=optimiser)
    labelled = count if recipe.cutmix else len(labels)
    if labelled:
        metrics['accuracy'] = accuracy(logits[:labelled], labels[:labelled])
    return state, metrics | step_metrics


def adversarial(
    model: Logits, images: jax.Array, labels: jax.Array, key: jax.Array, attacks: tuple[PGD, ...]
) -> jax.Array:
    """Returns untargeted adversarial examples, an equal part of the images by each attack, in their order.

    Args:
        model: Classifier in evaluation mode, [B, H, W, C] -> [B, K].
        images: float32 [B, H, W, C] in [0, 1].
        labels: int32 [B], true.
        key: PRNG key of the random starts.
        attacks: What is to be done.

    Returns:
        float32 [B, H, W, C].
    """
    keys = [key] if len(attacks) == 1 else list(jax.random.split(key, len(attacks)))
    ends = [len(labels) * i // len(attacks) for i in range(len(attacks) + 1)]
    parts = zip(attacks, keys, ends[:-1], ends[1:], strict=True)
    return jnp.concatenate([perturb(model, images[a:b], labels[a:b], k, pgd) for pgd, k, a, b in parts if a < b])


def cut_mix(key: jax.Array, images: jax.Array, largest: float) -> jax.Array:
    """Returns each of the images [B, H, W, C] with a rectangle of its neighbour in the (shuffled) batch.

    The rectangle has the shape of the image, a share of its area that is uniform between 0 and `largest`, and lies
    anywhere.

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features" (2019),
    whose rectangles may reach over the border.
    """
    area_key, rows_key, columns_key = jax.random.split(key, 3)
    count, height, width, _ = images.shape
    side = jnp.sqrt(jax.random.uniform(area_key, (count, 1), jnp.float32, 0.0, largest))

    def inside(key: jax.Array, length: int) -> jax.Array:
        first = jax.random.uniform(key, (count, 1)) * (1 - side)
        centres = (jnp.arange(length, dtype=jnp.float32)[None] + 0.5) / length
        return (centres >= first) & (centres < first + side)

    rectangle = inside(rows_key, height)[:, :, None] & inside(columns_key, width)[:, None, :]
    return jnp.where(rectangle[..., None], jnp.roll(images, 1, axis=0), images)
