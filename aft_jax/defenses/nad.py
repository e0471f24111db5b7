"""NAD: neural attention distillation (Li et al., "Neural Attention Distillation", ICLR 2021, arXiv 2101.05930).

The teacher is the infected model, fine-tuned for a few epochs on clean images. The student is the infected model again,
and learns the teacher's attention maps:

    loss = CE(student, true labels) + sum over blocks of beta_l D(A_l(student), A_l(teacher))

    A(F) = sum over channels of F^2, divided by its L2 norm over the H x W positions of an image
    D    = mean over images and positions of the squared difference, to which the published betas refer

The sum runs over the last blocks of the network, one for each beta, or over all if it has fewer. The teacher is in
evaluation mode. `defender.tune` chooses the learning rate of both. The betas are not tuned: large ones make a student
diverge without a limit on its gradients, and with one they only keep it closer to its teacher.

Needs: the infected model and clean images. Costs: for each learning rate a short fine-tuning, and a training with one
further forward pass a step.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from aft_jax.data.augment import AugmentOptions, augment
from aft_jax.data.order import count_steps
from aft_jax.defenses.defender import DefenderData, DefenseSettings, Purified, start_training, tune
from aft_jax.defenses.ft import fine_tune
from aft_jax.training.loop import fit
from aft_jax.training.stage import Fitted, Phase, Run, TrainingStage
from aft_jax.training.state import Batch, Metrics, TrainState
from aft_jax.training.steps import accuracy, cross_entropy, update

# Added to a squared norm, so that the gradient of a map that is zero everywhere is 0, not NaN.
TINY = 1e-12


class NadOptions(NamedTuple):
    """Section `nad` of the config.

    Attributes:
        teacher_epochs: Length of the teacher's fine-tuning.
        epochs: Length of the student's training.
        learning_rates: Candidates, from the weakest to the strongest, for teacher and student.
        schedule: 'constant' or 'cosine'.
        max_grad_norm: Largest norm of a gradient. 0 for no limit.
        betas: Weights of the last blocks' distances; the last beta belongs to the last block.
    """

    teacher_epochs: float
    epochs: float
    learning_rates: tuple[float, ...]
    schedule: str
    max_grad_norm: float
    betas: tuple[float, ...]


def purify(run: Run, name: str, data: DefenderData, settings: DefenseSettings) -> Purified:
    """Trains a teacher and a student for each learning rate, and takes the strongest student.

    Args:
        run: Experiment.
        name: Name of the defense. Each teacher and each student has a name of its own below it.
        data: Infected model and clean images.
        settings: Settings with `NadOptions`.
    """
    options: NadOptions = settings.options

    def train(name: str, kept: DefenderData, learning_rate: float) -> Fitted:
        epochs = options.teacher_epochs
        teacher = fine_tune(run, f'{name}/teacher', kept, settings, epochs=epochs, learning_rate=learning_rate)
        steps = count_steps(len(kept.labels), options.epochs, settings.batch_size)
        before, optimiser = start_training(kept, settings, steps, learning_rate)
        step = partial(
            nad_step,
            module=kept.module,
            optimiser=optimiser,
            betas=options.betas,
            augmentation=settings.augment,
        )
        stage = TrainingStage(
            name=f'{name}/student',
            state=before,
            phases=[Phase(step, steps)],
            arrays=kept.arrays,
            batch_size=settings.batch_size,
            constants=teacher.state.variables,
        )
        student = fit(run, stage)
        return student._replace(seconds=teacher.seconds + student.seconds)

    return tune(run, name, data, train, settings)


def nad_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    betas: Sequence[float],
    augmentation: AugmentOptions,
) -> tuple[TrainState, Metrics]:
    """Takes one step of the student.

    Args:
        state: State of the student before the step.
        batch: 'images' float32 [B, H, W, C] in [0, 1], 'labels' int32 [B], and 'constants', the teacher's variables.
        key: PRNG key of this step.
        module: Classifier that returns feature maps.
        optimiser: Optimiser of the student.
        betas: Weights of the last blocks' distances.
        augmentation: Options of `augment`.

    Returns:
        The state after the step; metrics with 'distance', the weighted sum of the distances.
    """
    augment_key, dropout_key = jax.random.split(key)
    labels = batch['labels']
    images = augment(augment_key, batch['images'], augmentation)
    _, teacher_maps = cast(Any, module.apply(batch['constants'], images, features=True))

    def distance(maps: Sequence[jax.Array]) -> jax.Array:
        return attention_distance(maps, teacher_maps, betas)

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


def attention_distance(
    maps: Sequence[jax.Array], teacher_maps: Sequence[jax.Array], betas: Sequence[float]
) -> jax.Array:
    """Computes the scalar sum of beta * D over the last len(betas) blocks, or over all blocks with the last betas.

    Args:
        maps: Feature map of each block, [B, H, W, C].
        teacher_maps: Those of the teacher.
        betas: Weights in the order of the blocks; the last one belongs to the last block.
    """
    count = min(len(maps), len(betas))
    distances = [
        beta * jnp.mean(jnp.square(attention(one) - attention(other)))
        for one, other, beta in zip(maps[-count:], teacher_maps[-count:], betas[-count:], strict=True)
    ]
    return jnp.stack(distances).sum()


def attention(features: jax.Array) -> jax.Array:
    """Computes the attention of a feature map [B, H, W, C]: float32 [B, H, W], of L2 norm 1 for each image."""
    energy = jnp.square(features.astype(jnp.float32)).sum(axis=-1)
    return energy * jax.lax.rsqrt(jnp.square(energy).sum(axis=(1, 2), keepdims=True) + TINY)
