"""AFT: adversarial fine-tuning ("Adversarial Fine-tuning for Backdoor Defense", arXiv 2202.06312).

Untargeted adversarial examples of an infected model behave like its triggered images, so that fine-tuning on them
with their true labels breaks the backdoor. Two stretches:

    adversarial   a share of each batch is replaced by adversarial examples of the model as it is at that step
    clean         clean images alone

On clean images the loss may hold the model to what the suspect model predicts for them:

    loss = adversarial_weight * sum over adversarial images of CE / B + sum over clean images of CE / B
         + distillation * mean over clean images of KL(suspect || model)

Adversarial examples are those of PGD, as in the paper, or, an equal part each, of specs of changes
(`aft_jax.adversarial.perturbations`): `universal` ones, which all images of a batch share, as they share a trigger, and `per_image` ones.
Shared changes are carried from step to step, so that they follow the model, and begun anew every `renew_every` steps.
At the same attack success rate they cost less clean accuracy than each image's own, which bend the model around that
image; those reach a trigger that is another one on every image, as of the input-aware attack (docs/results).

With cutmix the clean images have a rectangle of another one, and so neither label nor CE: the suspect's predictions
on them tell far more of what it knows than those on a few thousand images. (Mixtures that add two images up, as mixup
does, do not serve: they are blurred, and the suspect's predictions on them carry WaNet's backdoor over.)

At the end `recalibrate` measures the BatchNorm statistics anew on the clean images, since those of the training are of
mixtures.

Needs: the suspect model and clean images. Costs: `pgd_steps` further input gradients for each adversarial image.
"""

import math
import time
from functools import partial
from typing import cast

import ml_collections

from aft_jax.adversarial.perturbations import Kind, PerturbationSpec
from aft_jax.adversarial.pgd import PGD
from aft_jax.config import split_names
from aft_jax.data.order import count_steps
from aft_jax.defenses.aft_step import Recipe, SharedState, aft_step, begun, families_step
from aft_jax.defenses.batch_norm_statistics import Statistics
from aft_jax.defenses.defender import DefenderData, begin
from aft_jax.randomness import key_for
from aft_jax.training.loop import Fitted, Phase, Run, TrainingStage, fit
from aft_jax.training.state import TrainState


def purify(run: Run, stage: str, data: DefenderData, config: ml_collections.ConfigDict, section: str = 'aft') -> Fitted:
    """Returns the suspect model after adversarial fine-tuning on the clean images.

    Args:
        run: The experiment.
        stage: The name of its checkpoints and metrics.
        data: The defender's.
        config: The resolved config.
        section: Of the config, where the recipe is.
    """
    options = config[section]
    recipe = recipe_of(options, config.augment, data.images.shape[1:])
    fitted = train(run, stage, data, options, config, recipe, options.adversarial_epochs)
    if options.recalibrate:
        started = time.monotonic()
        statistics = Statistics(data.module, run.mesh, config.batch_size)
        after = fitted.state
        after = after.replace(batch_stats=statistics(after.variables, data.images)['batch_stats'])
        fitted = Fitted(after, fitted.seconds + time.monotonic() - started)
    return fitted


def train(
    run: Run,
    stage: str,
    data: DefenderData,
    options: ml_collections.ConfigDict,
    config: ml_collections.ConfigDict,
    recipe: Recipe,
    adversarial_epochs: float,
) -> Fitted:
    """Trains a model by a recipe.

    Args:
        run: The experiment.
        stage: The name of its checkpoints and metrics.
        data: The images that it is trained on; the model, which distillation also holds it to.
        options: The defense's own config, of which its epochs and its optimiser are read.
        config: The resolved config.
        recipe: Of an adversarial step.
        adversarial_epochs: How long the adversarial stretch is.
    """
    size, batch_size = len(data.labels), config.batch_size
    steps = count_steps(size, options.epochs, batch_size)
    adversarial_steps = min(steps, count_steps(size, adversarial_epochs, batch_size))
    before, optimiser = begin(data, options, config.train, steps)
    mixes = bool(recipe.specs)
    bound = partial(families_step if mixes else aft_step, module=data.module, optimiser=optimiser)
    phases = [
        Phase(partial(bound, recipe=recipe), adversarial_steps),
        Phase(partial(bound, recipe=recipe._replace(adversarial_share=0.0)), steps),
    ]
    first: TrainState | SharedState = before
    if mixes:
        first = SharedState(before, begun(recipe, key_for(run.seed, stage), data.images.shape[1:]))
    fitted = fit(run, TrainingStage(stage, first, phases, data.arrays, batch_size, constants=data.variables))
    return fitted._replace(state=fitted.state.classifier) if mixes else fitted


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
        pgd=pgd_of(options),
        adversarial_share=options.adversarial_share,
        distillation=options.distillation,
        augment=augmentation,
        adversarial_weight=options.adversarial_weight,
        cutmix=options.cutmix,
        specs=specs_of(options, image_shape),
        renew_every=options.renew_every,
    )


def pgd_of(options: ml_collections.ConfigDict) -> PGD:
    """Returns PGD as `config.aft` describes it."""
    return PGD(
        eps=options.eps,
        step_size=options.step_size,
        steps=options.pgd_steps,
        norm=options.norm,
        random_start=options.random_start,
        clip=options.clip,
    )


def specs_of(options: ml_collections.ConfigDict, image_shape: tuple[int, ...]) -> tuple[PerturbationSpec, ...]:
    """Returns the changes that `config.aft` names, as large as it says in images of shape (H, W, C)."""
    height, width, channels = image_shape
    sizes = {
        'linf': options.eps,
        'l2': options.rms_eps * math.sqrt(height * width * channels),
        'sparse': max(1, round(options.sparse_share * height * width / options.pgd_steps)),
        'warp': options.warp_share * min(height, width),
    }
    named = [(kind, True) for kind in split_names(options.universal)]
    named += [(kind, False) for kind in split_names(options.per_image)]
    return tuple(PerturbationSpec(cast(Kind, kind), sizes[kind], shared) for kind, shared in named)
