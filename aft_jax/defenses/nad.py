"""NAD: neural attention distillation (Li et al., "Neural Attention Distillation", ICLR 2021, arXiv 2101.05930).

A teacher, the suspect fine-tuned for a few epochs on clean images, shows a student, the suspect again, where to look:

    loss = CE(student, true labels) + factor * sum over stages of beta_l D(A_l(student), A_l(teacher))

    A(F) = sum over channels of F^2, divided by its L2 norm over the H x W places of an image
    D    = mean over images and places of the squared difference, for which the published betas are meant

The stages are the last ones of the network, one a beta, or all where it has fewer. The teacher is in evaluation mode.
The factor is the dial by which NAD tunes itself: a student for each, and `defender.strongest` chooses.

Needs: the suspect model and clean images. Costs: a fine-tuning, and for each factor a training with one further
forward pass a step.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

from aft_jax.data.augment import augment
from aft_jax.data.batches import count_steps
from aft_jax.defenses import defender
from aft_jax.defenses.defender import Holdings
from aft_jax.defenses.ft import fine_tune
from aft_jax.training.loop import Fitted, Phase, Run, fit
from aft_jax.training.state import Batch, Metrics, TrainState
from aft_jax.training.steps import accuracy, cross_entropy, update

# Added to a squared norm, so that the gradient of a map that is black everywhere is 0, not NaN.
TINY = 1e-12


def purify(run: Run, stage: str, holdings: Holdings, config: ml_collections.ConfigDict) -> Fitted:
    """Returns the strongest student that the held-out images do not speak against.

    Args:
        run: The experiment.
        stage: The name of the defense; the teacher and each student have stages of their own below it.
        holdings: The defender's.
        config: The resolved config; `config.nad` has teacher_epochs, epochs, learning_rate, schedule,
            max_grad_norm, betas and factors, from the weakest to the strongest.
    """
    options = config.nad
    kept, held = defender.hold_out(holdings, config.tuning.held_out_share, run.seed)
    teacher = fine_tune(run, f'{stage}/teacher', kept, options, options.teacher_epochs, config)
    steps = count_steps(len(kept.labels), options.epochs, config.batch_size)
    before, optimiser = defender.begin(kept, options, config.train, steps)
    bound = partial(nad_step, module=kept.module, optimiser=optimiser, augmentation=config.augment)
    students = []
    for factor in options.factors:
        step = partial(bound, betas=tuple(factor * beta for beta in options.betas))
        name = f'{stage}/student_{float(factor)}'
        phases = [Phase(step, steps)]
        students.append(fit(run, name, before, phases, kept.arrays, config.batch_size, fixed=teacher.state.variables))
    started = time.monotonic()
    accuracies = [defender.accuracy(run, held, student.state.variables) for student in students]
    suspect = defender.accuracy(run, held, holdings.variables)
    chosen = students[defender.strongest(accuracies, suspect, config.tuning.budget)]
    tuning = time.monotonic() - started
    return Fitted(chosen.state, teacher.seconds + sum(student.seconds for student in students) + tuning)


def nad_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    betas: Sequence[float],
    augmentation: ml_collections.ConfigDict,
) -> tuple[TrainState, Metrics]:
    """One step of the student.

    Args:
        state: The student's before the step.
        batch: 'images' float32 [B, H, W, C] in [0, 1], 'labels' int32 [B], and 'fixed', the teacher's variables.
        key: PRNG key of this step.
        module: The classifier, with `features`.
        optimiser: Its optimiser.
        betas: Weights of the last stages' distances.
        augmentation: `config.augment`.

    Returns:
        The state after the step; metrics with 'distance', the weighted sum of the distances.
    """
    augment_key, dropout_key = jax.random.split(key)
    labels = batch['labels']
    images = augment(augment_key, batch['images'], augmentation)
    _, wanted = cast(Any, module.apply(batch['fixed'], images, features=True))

    def distance(maps: Sequence[jax.Array]) -> jax.Array:
        return attention_distance(maps, wanted, betas)

    state, (logits, maps), metrics = update(
        state,
        images,
        lambda output: cross_entropy(output[0], labels) + distance(output[1]),
        dropout_key,
        module=module,
        optimiser=optimiser,
        features=True,
    )
    return state, metrics | {'accuracy': accuracy(logits, labels), 'distance': distance(maps)}


def attention_distance(maps: Sequence[jax.Array], wanted: Sequence[jax.Array], betas: Sequence[float]) -> jax.Array:
    """Returns the scalar sum of beta * D over the last len(betas) stages, or over all with the last betas.

    Args:
        maps: Of a stage each, [B, H, W, C].
        wanted: The teacher's.
        betas: For stages in order, the last for the last.
    """
    count = min(len(maps), len(betas))
    distances = [
        beta * jnp.mean(jnp.square(attention(one) - attention(other)))
        for one, other, beta in zip(maps[-count:], wanted[-count:], betas[-count:], strict=True)
    ]
    return jnp.stack(distances).sum()


def attention(features: jax.Array) -> jax.Array:
    """Returns where a stage looks, float32 [B, H, W] of L2 norm 1 for each image, from its map [B, H, W, C]."""
    energy = jnp.square(features.astype(jnp.float32)).sum(axis=-1)
    return energy * jax.lax.rsqrt(jnp.square(energy).sum(axis=(1, 2), keepdims=True) + TINY)
