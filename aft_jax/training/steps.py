"""Pure functions for a step of supervised training. The steps of attacks and defenses are built from them."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from aft_jax.training.state import Batch, Metrics, TrainState

# (key, images, labels) -> (images, labels)
Transform = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
# Output of the module, usually logits [B, K] -> scalar
Loss = Callable[[Any], jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the mean cross-entropy of float32 logits [B, K] against int32 labels [B]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the share of images whose largest logit [B, K] is that of the label [B]; float32 scalar."""
    return jnp.mean((logits.argmax(axis=-1) == labels).astype(jnp.float32))


def update(
    state: TrainState,
    images: jax.Array,
    loss: Loss,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    **apply_options: Any,
) -> tuple[TrainState, Any, Metrics]:
    """Takes one gradient step on `loss(module output)`, the model in training mode.

    Args:
        state: State before the step.
        images: float32 [B, H, W, C] in [0, 1].
        loss: Function of the module's output, which is logits [B, K] by default.
        key: PRNG key of dropout.
        module: Classifier.
        optimiser: Optimiser of the classifier.
        apply_options: Further arguments of the module. With features=True its output is (logits, feature maps).

    Returns:
        The state after the step, the module's output before it, and the metrics 'loss' and 'grad_norm'.
    """

    def objective(params):
        output, batch_stats = apply_training(module, state, params, images, key, **apply_options)
        return loss(output), (output, batch_stats)

    (value, (output, batch_stats)), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
    after = advance(state, gradient, batch_stats, optimiser)
    return after, output, {'loss': value, 'grad_norm': optax.tree.norm(gradient)}


def apply_training(
    module: nn.Module,
    state: TrainState,
    params: Any,
    images: jax.Array,
    key: jax.Array | None = None,
    **apply_options: Any,
) -> tuple[Any, Any]:
    """Applies a module in training mode.

    Args:
        module: Network.
        state: State that holds the BatchNorm statistics.
        params: Parameters, of which the caller may take a gradient.
        images: float32 [B, H, W, C] in [0, 1].
        key: PRNG key of dropout; None for a network without dropout.
        apply_options: Further arguments of the network, such as features=True.

    Returns:
        The output of the module, and its new BatchNorm statistics.
    """
    variables = {'params': params, 'batch_stats': state.batch_stats}
    rngs = None if key is None else {'dropout': key}
    output, updated = module.apply(variables, images, train=True, mutable=['batch_stats'], rngs=rngs, **apply_options)
    return output, updated.get('batch_stats', {})


def advance(state: TrainState, gradient: Any, batch_stats: Any, optimiser: optax.GradientTransformation) -> TrainState:
    """Takes the optimiser's step down `gradient`, and stores the new BatchNorm statistics."""
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
    """Takes a step down the cross-entropy of a transformed batch.

    Args:
        state: State before the step.
        batch: 'images' float32 [B, H, W, C] in [0, 1] and 'labels' int32 [B].
        key: PRNG key of this step.
        module: Classifier.
        optimiser: Optimiser of the classifier.
        transform: Augmentation, and poisoning where it happens batch by batch.

    Returns:
        The state after the step; the metrics 'loss', 'grad_norm' and 'accuracy'.
    """
    transform_key, dropout_key = jax.random.split(key)
    images, labels = transform(transform_key, batch['images'], batch['labels'])
    state, logits, metrics = update(
        state, images, lambda z: cross_entropy(z, labels), dropout_key, module=module, optimiser=optimiser
    )
    return state, metrics | {'accuracy': accuracy(logits, labels)}
