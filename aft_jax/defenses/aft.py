"""AFT: adversarial fine-tuning ("Adversarial Fine-tuning for Backdoor Defense", arXiv 2202.06312).

Untargeted adversarial examples of an infected model behave like its triggered images, so that fine-tuning on them
with their true labels breaks the backdoor. Two stretches:

    adversarial   a share of each batch is replaced by PGD examples of the model as it is at that step
    clean         clean images alone

On clean images the loss may hold the model to what the suspect model predicted for them:

    loss = CE(all images, true labels) + distillation * mean over clean images of KL(suspect || model)

Needs: the suspect model and clean images. Costs: `pgd_steps` further input gradients in each adversarial step.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

from aft_jax.adversarial import PGD, perturb
from aft_jax.data.augment import augment
from aft_jax.data.batches import count_steps
from aft_jax.defenses.defender import Holdings, begin
from aft_jax.models import logits_function
from aft_jax.training.loop import Fitted, Phase, Run, fit
from aft_jax.training.state import Batch, Metrics, TrainState
from aft_jax.training.steps import accuracy, cross_entropy, update


class Recipe(NamedTuple):
    """What a step of AFT is to do.

    Attributes:
        pgd: How adversarial examples are made.
        adversarial_share: Of a batch, replaced by adversarial examples; 0 in the clean stretch.
        distillation: Weight of the suspect model's predictions on clean images.
        augment: `config.augment`.
    """

    pgd: PGD
    adversarial_share: float
    distillation: float
    augment: ml_collections.ConfigDict


def purify(run: Run, stage: str, holdings: Holdings, config: ml_collections.ConfigDict) -> Fitted:
    """Returns the suspect model after adversarial fine-tuning on the clean images.

    Args:
        run: The experiment.
        stage: The name of its checkpoints and metrics.
        holdings: The defender's.
        config: The resolved config; `config.aft` has the recipe.
    """
    options = config.aft
    size = len(holdings.labels)
    steps = count_steps(size, options.epochs, config.batch_size)
    adversarial_steps = min(steps, count_steps(size, options.adversarial_epochs, config.batch_size))
    before, optimiser = begin(holdings, options, config.train, steps)
    recipe = Recipe(
        pgd=PGD(
            eps=options.eps,
            step_size=options.step_size,
            steps=options.pgd_steps,
            norm=options.norm,
            random_start=options.random_start,
            clip=options.clip,
        ),
        adversarial_share=options.adversarial_share,
        distillation=options.distillation,
        augment=config.augment,
    )
    bound = partial(aft_step, module=holdings.module, optimiser=optimiser)
    phases = [
        Phase(partial(bound, recipe=recipe), adversarial_steps),
        Phase(partial(bound, recipe=recipe._replace(adversarial_share=0.0)), steps),
    ]
    return fit(run, stage, before, phases, holdings.arrays, config.batch_size, fixed=holdings.variables)


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
        (in an adversarial step).
    """
    augment_key, start_key, dropout_key = jax.random.split(key, 3)
    labels = batch['labels']
    images = augment(augment_key, batch['images'], recipe.augment)
    count = round(recipe.adversarial_share * len(labels))
    clean = images[count:]
    metrics: Metrics = {}
    if count:
        model = logits_function(module, state.variables)
        examples = jax.lax.stop_gradient(perturb(model, images[:count], labels[:count], start_key, recipe.pgd))
        metrics['fooled'] = 1 - accuracy(model(examples), labels[:count])
        images = jnp.concatenate([examples, clean])
    distils = recipe.distillation > 0 and len(clean) > 0
    wanted = jax.nn.softmax(logits_function(module, batch['fixed'])(clean)) if distils else None

    def loss(logits: jax.Array) -> jax.Array:
        value = cross_entropy(logits, labels)
        if wanted is not None:
            divergence = optax.kl_divergence(jax.nn.log_softmax(logits[count:]), wanted)
            value = value + recipe.distillation * divergence.mean()
        return value

    state, logits, step_metrics = update(state, images, loss, dropout_key, module=module, optimiser=optimiser)
    return state, metrics | step_metrics | {'accuracy': accuracy(logits, labels)}
