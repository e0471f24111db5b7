"""SAU: shared adversarial unlearning (Wei et al., "Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning
Shared Adversarial Examples", NeurIPS 2023, arXiv 2307.10562).

An adversarial example of the model f is shared if it moves the infected model f_0 to the same wrong label. A triggered
image is one of them as long as f has the backdoor. SAU finds shared examples and makes f leave the labels of f_0 there:

    inner:  min over |d| <= eps of  attack_weight L_adv + sharing_weight L_share
            L_adv   = -1/2 [mean CE(f(x + d), y) over images that do not fool f + the same for f_0]
            L_share = mean JS(f(x + d), f_0(x + d)) over images that are not shared yet
    outer:  min over f of  clean_weight CE(f(x), y) + adversarial_weight CE(f(x + d), y) + unlearning_weight L_sh
            L_sh    = 1/B sum of -log(1 - p_c(x + d)),    c = the label of f_0 at x + d

The sum of L_sh is over the images at which f_0 predicts a label that is neither the true one nor its label of the clean
image. The inner problem is solved by sign steps from the corner d = +eps. A step is as long as the radius. x + d may
leave [0, 1], as in the authors' code. An image that fools both models into the same label moves no further.

BatchNorm keeps the running statistics of the infected model. The classifier is in evaluation mode throughout, and so
without dropout. The authors' code writes L_sh twice, as -log of the sum of the other probabilities too, and clamps all
probabilities. The clamp removes the gradient where f is most certain of c. Here L_sh comes from the logits, without a
clamp. The defaults are those of the paper for CIFAR-10 (5 % of the training images, batches of 256).

Needs: the infected model and clean images. Costs: for each step, `steps` gradients of f and of f_0 with respect to the
images, one gradient of f for twice the batch, and one prediction of f_0 for it; with 5 steps about 12 training steps.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from aft_jax.adversarial.pgd import Logits, repeat, slow_in_loops
from aft_jax.data.augment import AugmentOptions, augment
from aft_jax.data.order import count_steps
from aft_jax.defenses.defender import DefenderData, DefenseSettings, Purified, tune
from aft_jax.models import logits_function
from aft_jax.training import state as training_state
from aft_jax.training.loop import fit
from aft_jax.training.optimiser import adam
from aft_jax.training.stage import Fitted, Phase, Run, TrainingStage
from aft_jax.training.state import Batch, Metrics, TrainState
from aft_jax.training.steps import accuracy, advance, cross_entropy


class SauOptions(NamedTuple):
    """Section `sau` of the config.

    Attributes:
        eps: Radius of the perturbations, Linf, in units of [0, 1] pixels.
        step_size: Length of a step, in the same units.
        steps: Steps of the inner problem.
        attack_weight: Weight of L_adv.
        sharing_weight: Weight of L_share.
        clean_weight: Weight of the cross-entropy of clean images.
        adversarial_weight: Weight of the cross-entropy of perturbed images.
        unlearning_weight: Weight of L_sh.
        epochs: Length of the training.
        learning_rates: Candidates for Adam, from the weakest to the strongest.
    """

    eps: float
    step_size: float
    steps: int
    attack_weight: float
    sharing_weight: float
    clean_weight: float
    adversarial_weight: float
    unlearning_weight: float
    epochs: float
    learning_rates: tuple[float, ...]


def purify(run: Run, name: str, data: DefenderData, settings: DefenseSettings) -> Purified:
    """Unlearns the shared adversarial examples, for each learning rate, and takes the strongest model.

    Args:
        run: Experiment.
        name: Name of checkpoints and metrics.
        data: Infected model and clean images.
        settings: Settings with `SauOptions`.
    """
    options: SauOptions = settings.options

    def train(name: str, kept: DefenderData, learning_rate: float) -> Fitted:
        optimiser = adam(learning_rate)
        step = partial(
            sau_step, module=kept.module, optimiser=optimiser, options=options, augmentation=settings.augment
        )
        stage = TrainingStage(
            name=name,
            state=training_state.create(kept.variables, optimiser),
            phases=[Phase(step, count_steps(len(kept.labels), options.epochs, settings.batch_size))],
            arrays=kept.arrays,
            batch_size=settings.batch_size,
            constants=kept.variables,
        )
        return fit(run, stage)

    return tune(run, name, data, train, settings)


def sau_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    options: SauOptions,
    augmentation: AugmentOptions,
) -> tuple[TrainState, Metrics]:
    """Takes one step of SAU.

    Args:
        state: State before the step.
        batch: 'images' float32 [B, H, W, C] in [0, 1], 'labels' int32 [B], and 'constants', the infected model's
            variables.
        key: PRNG key of this step.
        module: Classifier.
        optimiser: Optimiser of the classifier.
        options: Options of SAU.
        augmentation: Options of `augment`.

    Returns:
        The state after the step; metrics with 'shared', the share of images that fool both models before the step into
        the same label, and 'unlearned', the share of images in L_sh.
    """
    images, labels = augment(key, batch['images'], augmentation), batch['labels']
    size = len(images)
    current, infected = logits_function(module, state.variables), logits_function(module, batch['constants'])
    perturbed = images + shared_perturbations(current, infected, images, labels, options)
    infected_labels, perturbed_labels = jnp.split(infected(jnp.concatenate([images, perturbed])).argmax(axis=-1), 2)
    unlearned = (perturbed_labels != labels) & (perturbed_labels != infected_labels)

    def objective(params):
        model = logits_function(module, {'params': params, 'batch_stats': state.batch_stats})
        logits = model(jnp.concatenate([images, perturbed]))
        clean, adversarial = logits[:size], logits[size:]
        avoidance = jnp.where(unlearned, avoidance_loss(adversarial, perturbed_labels), 0.0).mean()
        loss = (
            options.clean_weight * cross_entropy(clean, labels)
            + options.adversarial_weight * cross_entropy(adversarial, labels)
            + options.unlearning_weight * avoidance
        )
        return loss, logits

    (loss, logits), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
    adversarial_labels = logits[size:].argmax(axis=-1)
    shared = (adversarial_labels == perturbed_labels) & (adversarial_labels != labels)
    metrics = {
        'loss': loss,
        'grad_norm': optax.tree.norm(gradient),
        'accuracy': accuracy(logits[:size], labels),
        'shared': shared.mean(dtype=jnp.float32),
        'unlearned': unlearned.mean(dtype=jnp.float32),
    }
    return advance(state, gradient, state.batch_stats, optimiser), metrics


def shared_perturbations(
    current: Logits, infected: Logits, images: jax.Array, labels: jax.Array, options: SauOptions
) -> jax.Array:
    """Searches perturbations that fool both models into the same label, by sign steps from the corner +eps.

    Args:
        current: Model in training.
        infected: Infected model.
        images: float32 [B, H, W, C].
        labels: int32 [B], true classes.
        options: Options of SAU.

    Returns:
        float32 [B, H, W, C] in [-eps, eps].
    """
    both = (current, infected)

    def loss(perturbation: jax.Array) -> jax.Array:
        logits = [model(images + perturbation) for model in both]
        predicted = [z.argmax(axis=-1) for z in logits]
        attack = sum(
            masked_mean(optax.softmax_cross_entropy_with_integer_labels(z, labels), classes == labels)
            for z, classes in zip(logits, predicted, strict=True)
        )
        shared = (predicted[0] == predicted[1]) & (predicted[0] != labels)
        sharing = masked_mean(jensen_shannon(*logits), ~shared)
        return -options.attack_weight * attack / 2 + options.sharing_weight * sharing

    gradient = jax.grad(loss)

    def step(perturbation: jax.Array) -> jax.Array:
        moved = perturbation - options.step_size * jnp.sign(gradient(perturbation))
        return jnp.clip(moved, -options.eps, options.eps)

    start = jnp.full_like(images, options.eps)
    return repeat(step, start, options.steps, unroll=slow_in_loops(current))


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Averages the values [B] where the mask [B] holds; 0 if it holds nowhere."""
    return jnp.where(mask, values, 0.0).sum() / jnp.maximum(mask.sum(dtype=jnp.float32), 1.0)


def jensen_shannon(first: jax.Array, second: jax.Array) -> jax.Array:
    """Computes the Jensen-Shannon divergence [B] in nats between the predictions of two models with logits [B, K]."""
    p, q = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
    middle = jnp.logaddexp(p, q) - jnp.log(2.0)
    return jnp.sum(jnp.exp(p) * (p - middle) + jnp.exp(q) * (q - middle), axis=-1) / 2


def avoidance_loss(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """Computes -log(1 - p_c), [B], for logits [B, K] and classes c, int32 [B], exact near p_c = 1."""
    others = jnp.where(jax.nn.one_hot(classes, logits.shape[-1], dtype=bool), -jnp.inf, logits)
    return jax.nn.logsumexp(logits, axis=-1) - jax.nn.logsumexp(others, axis=-1)
