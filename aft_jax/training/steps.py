"""One pure step of supervised training, which every stage is built from."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from aft_jax.training.state import Batch, Metrics, TrainState

# (key, images, labels) -> (images, labels)
Transform = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
# logits [B, K], or whatever else the module was asked to return -> scalar
Loss = Callable[[Any], jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of float32 logits [B, K] against int32 labels [B]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def update(
    state: TrainState,
    images: jax.Array,
    loss: Loss,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    **asked: Any,
) -> tuple[TrainState, Any, Metrics]:
    """Takes one gradient step on `loss(logits of images)`, the model in training mode.

    Args:
        state: Before the step.
        images: float32 [B, H, W, C] in [0, 1].
        loss: Of the logits [B, K].
        key: PRNG key of dropout.
        module: The classifier.
        optimiser: Its optimiser.
        asked: Further arguments of the module. With features=True it returns (logits, feature maps), and so `loss` is
            of both.

    Returns:
        The state after the step, the logits [B, K] before it, and the metrics 'loss' and 'grad_norm'.
    """

    def objective(params):
        output, batch_stats = apply_training(module, state, params, images, key, **asked)
        return loss(output), (output, batch_stats)

    (value, (output, batch_stats)), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
    after = advance(state, gradient, batch_stats, optimiser)
    return after, output, {'loss': value, 'grad_norm': optax.tree.norm(gradient)}


def apply_training(
    module: nn.Module, state: TrainState, params: Any, images: jax.Array, key: jax.Array | None = None, **asked: Any
) -> tuple[Any, Any]:
    """Returns a module's output in training mode, with these parameters, and its new BatchNorm statistics.

    Args:
        module: The network.
        state: Where its statistics are read.
        params: Its parameters, which a gradient may be taken of.
        images: float32 [B, H, W, C] in [0, 1].
        key: PRNG key of dropout; None for a network without.
        asked: Further arguments of the network, such as features=True.
    """
    variables = {'params': params, 'batch_stats': state.batch_stats}
    rngs = None if key is None else {'dropout': key}
    output, changes = module.apply(variables, images, train=True, mutable=['batch_stats'], rngs=rngs, **asked)
    return output, changes.get('batch_stats', {})


def advance(state: TrainState, gradient: Any, batch_stats: Any, optimiser: optax.GradientTransformation) -> TrainState:
    """Returns the state one step on: the optimiser's step down `gradient`, and the new statistics."""
    updates, opt_state = optimiser.update(gradient, state.opt_state, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), batch_stats, opt_state)


def classification_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    transform: Transform,
) -> tuple[TrainState, Metrics]:
    """Cross-entropy on a transformed batch.

    Args:
        state: Before the step.
        batch: 'images' float32 [B, H, W, C] in [0, 1] and 'labels' int32 [B].
        key: PRNG key of this step.
        module: The classifier.
        optimiser: Its optimiser.
        transform: Augmentation, and poisoning where it happens batch by batch.

    Returns:
        The state after the step and its metrics.
    """
    transform_key, dropout_key = jax.random.split(key)
    images, labels = transform(transform_key, batch['images'], batch['labels'])
    state, logits, metrics = update(
        state, images, lambda z: cross_entropy(z, labels), dropout_key, module=module, optimiser=optimiser
    )
    return state, metrics | {'accuracy': accuracy(logits, labels)}


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the share of the batch whose largest logit [B, K] is the label [B]; float32 scalar."""
    return jnp.mean((logits.argmax(axis=-1) == labels).astype(jnp.float32))
