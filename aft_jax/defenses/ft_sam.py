"""FT-SAM: fine-tuning with sharpness-aware minimisation (Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with
Sharpness-Aware Minimization", ICCV 2023, arXiv 2304.11823).

Plain fine-tuning leaves the long weights of backdoor neurons alone. FT-SAM trains on clean images at the worst point
near the weights w. The neighbourhood is adaptive, so long weights are moved most (Kwon et al., "ASAM", ICML 2021):

    min over w of  max over |e / w| <= rho of  CE(f_{w + e}(x), y)
    e = rho w^2 g / | |w| g |,    g = the gradient of the loss at w

with products and quotients element by element, one Euclidean norm over all parameters, and labels smoothed: the true
class has 1 - smoothing, each other class smoothing / (K - 1). The gradient at w + e is applied at w. Batch statistics
normalise both passes, and those of the first pass alone enter the running statistics.

The paper trains on 5 % of CIFAR-10 for 100 epochs in batches of 256, with SGD at .01 (momentum .9, weight decay 5e-4),
rho 2 and smoothing .1, and takes rho 8 without smoothing for GTSRB and Tiny ImageNet. In the public code the cosine of
100 epochs is advanced in every batch, so the learning rate falls and rises many times. Here it falls once. Momentum and
weight decay are those of the other defenses.

Needs: the infected model and clean images. Costs: two training steps a batch, for each learning rate.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from aft_jax.data.augment import AugmentOptions, augment
from aft_jax.data.order import count_steps
from aft_jax.defenses.defender import DefenderData, DefenseSettings, Purified, start_training, tune
from aft_jax.training.loop import fit
from aft_jax.training.stage import Fitted, Phase, Run, TrainingStage
from aft_jax.training.state import Batch, Metrics, TrainState
from aft_jax.training.steps import accuracy, advance, apply_training


class FtSamOptions(NamedTuple):
    """Section `ft_sam` of the config.

    Attributes:
        rho: Radius of the neighbourhood of the weights.
        smoothing: Probability that the labels give to the wrong classes together.
        epochs: Length of the training.
        learning_rates: Candidates, from the weakest to the strongest.
        schedule: 'constant' or 'cosine'.
        max_grad_norm: Largest norm of a gradient. 0 for no limit.
    """

    rho: float
    smoothing: float
    epochs: float
    learning_rates: tuple[float, ...]
    schedule: str
    max_grad_norm: float


def purify(run: Run, name: str, data: DefenderData, settings: DefenseSettings) -> Purified:
    """Fine-tunes the infected model, for each learning rate, and takes the strongest model.

    Args:
        run: Experiment.
        name: Name of checkpoints and metrics.
        data: Infected model and clean images.
        settings: Settings with `FtSamOptions`.
    """
    options: FtSamOptions = settings.options

    def train(name: str, kept: DefenderData, learning_rate: float) -> Fitted:
        steps = count_steps(len(kept.labels), options.epochs, settings.batch_size)
        before, optimiser = start_training(kept, settings, steps, learning_rate)
        step = partial(
            sam_step,
            module=kept.module,
            optimiser=optimiser,
            rho=options.rho,
            smoothing=options.smoothing,
            augmentation=settings.augment,
        )
        return fit(run, TrainingStage(name, before, [Phase(step, steps)], kept.arrays, settings.batch_size))

    return tune(run, name, data, train, settings)


def sam_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    rho: float,
    smoothing: float,
    augmentation: AugmentOptions,
) -> tuple[TrainState, Metrics]:
    """Takes one step of FT-SAM.

    Args:
        state: State before the step.
        batch: 'images' float32 [B, H, W, C] in [0, 1] and 'labels' int32 [B].
        key: PRNG key of this step. Both passes have the same dropout.
        module: Classifier.
        optimiser: Optimiser of the classifier.
        rho: Radius of the neighbourhood.
        smoothing: Probability of the wrong classes.
        augmentation: Options of `augment`.

    Returns:
        The state after the step; metrics with 'loss' at the weights and 'sharp_loss' at the worst point near them.
    """
    augment_key, dropout_key = jax.random.split(key)
    labels = batch['labels']
    images = augment(augment_key, batch['images'], augmentation)

    def objective(params):
        logits, batch_stats = apply_training(module, state, params, images, dropout_key)
        return smoothed_cross_entropy(logits, labels, smoothing), (logits, batch_stats)

    gradient_of = jax.value_and_grad(objective, has_aux=True)
    (loss, (logits, batch_stats)), uphill = gradient_of(state.params)
    worst = jax.tree.map(jnp.add, state.params, worst_move(state.params, uphill, rho))
    (sharp_loss, _), gradient = gradient_of(worst)
    metrics = {
        'loss': loss,
        'sharp_loss': sharp_loss,
        'grad_norm': optax.tree.norm(gradient),
        'accuracy': accuracy(logits, labels),
    }
    return advance(state, gradient, batch_stats, optimiser), metrics


def worst_move(params: Any, gradient: Any, rho: float) -> Any:
    """Computes e = rho w^2 g / | |w| g |, a pytree like the parameters w and their gradient g; zero where |w| g is."""
    norm = optax.tree.norm(jax.tree.map(jnp.multiply, params, gradient))
    factor = rho / jnp.where(norm > 0, norm, 1.0)
    return jax.tree.map(lambda w, g: factor * jnp.square(w) * g, params, gradient)


def smoothed_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Computes the mean cross-entropy of logits [B, K] against labels [B] of probability 1 - smoothing."""
    classes = logits.shape[-1]
    true = jax.nn.one_hot(labels, classes, dtype=logits.dtype)
    targets = (1 - smoothing) * true + smoothing / (classes - 1) * (1 - true)
    return optax.softmax_cross_entropy(logits, targets).mean()
