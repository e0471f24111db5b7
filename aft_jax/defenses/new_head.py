"""What defenses share that train with a new head: how it is drawn, the step, and the constraint on its length.

The kernel W of the head keeps the length |W0| of the infected one, in the Frobenius norm:

    step down loss(logits, labels, W, W0),    then    W <- W |W0| / |W|
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from aft_jax.data.augment import AugmentOptions, augment
from aft_jax.data.order import count_steps
from aft_jax.defenses.defender import DefenderData, DefenseSettings, Purified, start_training, tune
from aft_jax.models.head import HeadPath, layer_at, replace_layer
from aft_jax.training.loop import fit
from aft_jax.training.stage import Fitted, Phase, Run, TrainingStage
from aft_jax.training.state import Batch, Metrics, TrainState
from aft_jax.training.steps import accuracy, advance, apply_training

# (logits [B, K], labels [B], kernel of the head [d, K], kernel of the infected head [d, K]) -> scalar
HeadLoss = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def purify_with_new_head(
    run: Run, name: str, data: DefenderData, settings: DefenseSettings, *, head: HeadPath, params: Any, loss: HeadLoss
) -> Purified:
    """Trains the model with its new head, for each learning rate, and takes the strongest model.

    Args:
        run: Experiment.
        name: Name of checkpoints and metrics.
        data: Infected model and clean images.
        settings: Settings whose options have `epochs`, `learning_rates`, `schedule` and `max_grad_norm`.
        head: Path of the head.
        params: Parameters of the infected model with the new head, from which all learning rates start.
        loss: Loss of the training.
    """
    infected_kernel = layer_at(data.variables['params'], head)['kernel']

    def train(name: str, kept: DefenderData, learning_rate: float) -> Fitted:
        steps = count_steps(len(kept.labels), settings.options.epochs, settings.batch_size)
        before, optimiser = start_training(kept, settings, steps, learning_rate)
        step = partial(
            head_step, module=kept.module, optimiser=optimiser, head=head, loss=loss, augmentation=settings.augment
        )
        stage = TrainingStage(
            name=name,
            state=before,
            phases=[Phase(step, steps)],
            arrays=kept.arrays,
            batch_size=settings.batch_size,
            constants=infected_kernel,
        )
        return fit(run, stage)

    return tune(run, name, data._replace(variables=data.variables | {'params': params}), train, settings)


def head_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    head: HeadPath,
    loss: HeadLoss,
    augmentation: AugmentOptions,
) -> tuple[TrainState, Metrics]:
    """Takes a step down the loss, and gives the head's kernel the length of the infected one.

    Args:
        state: State before the step.
        batch: 'images' float32 [B, H, W, C] in [0, 1], 'labels' int32 [B], and 'constants', the kernel [d, K] of the
            infected head.
        key: PRNG key of this step.
        module: Classifier.
        optimiser: Optimiser of the classifier.
        head: Path of the head.
        loss: Loss of the training.
        augmentation: Options of `augment`.

    Returns:
        The state after the step; metrics with 'head_cosine', the cosine between the head's kernel and the infected one
        after the step.
    """
    augment_key, dropout_key = jax.random.split(key)
    labels, infected_kernel = batch['labels'], batch['constants']
    images = augment(augment_key, batch['images'], augmentation)

    def objective(params):
        logits, batch_stats = apply_training(module, state, params, images, dropout_key)
        return loss(logits, labels, layer_at(params, head)['kernel'], infected_kernel), (logits, batch_stats)

    (value, (logits, batch_stats)), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
    after = advance(state, gradient, batch_stats, optimiser)
    norm = jnp.linalg.norm(infected_kernel)
    params = with_length(after.params, head, norm)
    kernel = layer_at(params, head)['kernel']
    metrics = {
        'loss': value,
        'grad_norm': optax.tree.norm(gradient),
        'accuracy': accuracy(logits, labels),
        'head_cosine': jnp.sum(kernel * infected_kernel) / jnp.square(norm),
    }
    return replace(after, params=params), metrics


def with_length(params: Any, head: HeadPath, norm: jax.Array) -> Any:
    """Copies the parameters, with the head's kernel scaled to a Frobenius norm."""
    layer = layer_at(params, head)
    kernel = layer['kernel'] * (norm / jnp.linalg.norm(layer['kernel']))
    return replace_layer(params, head, layer | {'kernel': kernel})


def draw_uniform(key: jax.Array, layer: dict[str, jax.Array], bound: float) -> dict[str, jax.Array]:
    """Draws the parameters of a layer from U(-bound, bound), in the shapes of `layer`."""
    keys = jax.random.split(key, len(layer))
    return {
        name: jax.random.uniform(keys[i], layer[name].shape, minval=-bound, maxval=bound)
        for i, name in enumerate(sorted(layer))
    }
