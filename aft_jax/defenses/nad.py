"""NAD: neural attention distillation (Li et al., "Neural Attention Distillation", ICLR 2021, arXiv 2101.05930).

A teacher, the suspect fine-tuned for a few epochs on clean images, shows a student, the suspect again, where to look:

    loss = CE(student, true labels) + sum over stages of beta_l D(A_l(student), A_l(teacher))

    A(F) = sum over channels of F^2, divided by its L2 norm over the H x W places of an image
    D    = mean over images and places of the squared difference, for which the published betas are meant

The stages are the last ones of the network, one a beta, or all where it has fewer. The teacher is in evaluation mode.
The learning rate of both is the dial by which NAD tunes itself (`defender.tune`). The betas are not: without a bound on
the gradient large ones make a student go astray, and with one they only tie it more closely to its teacher.

Needs: the suspect model and clean images. Costs: for each learning rate a short fine-tuning, and a training with one
further forward pass a step.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

from aft_jax.data.augment import augment
from aft_jax.data.order import count_steps
from aft_jax.defenses.defender import DefenderData, begin, tune
from aft_jax.defenses.ft import fine_tune
from aft_jax.training.loop import Fitted, Phase, Run, TrainingStage, fit
from aft_jax.training.state import Batch, Metrics, TrainState
from aft_jax.training.steps import accuracy, cross_entropy, update

# Added to a squared norm, so that the gradient of a map that is black everywhere is 0, not NaN.
TINY = 1e-12


def purify(run: Run, stage: str, data: DefenderData, config: ml_collections.ConfigDict) -> Fitted:
    """Returns the student.

    Args:
        run: The experiment.
        stage: The name of the defense; the teacher and each student have stages of their own below it.
        data: The defender's.
        config: The resolved config; `config.nad` has teacher_epochs, epochs, learning_rates, schedule, max_grad_norm
            and betas.
    """
    options = config.nad

    def train(name: str, held: DefenderData, learning_rate: float) -> Fitted:
        teacher = fine_tune(run, f'{name}/teacher', held, options, options.teacher_epochs, config, learning_rate)
        steps = count_steps(len(held.labels), options.epochs, config.batch_size)
        before, optimiser = begin(held, options, config.train, steps, learning_rate)
        step = partial(
            nad_step,
            module=held.module,
            optimiser=optimiser,
            betas=tuple(options.betas),
            augmentation=config.augment,
        )
        constants = teacher.state.variables
        student = fit(
            run,
            TrainingStage(
                f'{name}/student', before, [Phase(step, steps)], held.arrays, config.batch_size, constants=constants
            ),
        )
        return student._replace(seconds=teacher.seconds + student.seconds)

    return tune(run, stage, data, options.learning_rates, train, config.tuning)


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
    _, wanted = cast(Any, module.apply(batch['constants'], images, features=True))

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
