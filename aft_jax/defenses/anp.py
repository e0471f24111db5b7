"""ANP: adversarial neuron pruning (Wu & Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", 2021).

A little noise on the neurons of an infected model makes it say the target label without any trigger, and the neurons
that do it are the backdoor's. A neuron is a channel of a BatchNorm, of scale w and bias b, and has a mask m in [0, 1]:

    min over m of   clean_weight CE(m w, b) + (1 - clean_weight) max over |d|, |e| <= eps of CE((m + d) w, (1 + e) b)

The maximum is one sign step of length eps from a random start, cut to the budget; the minimum is SGD with momentum, the
masks cut to [0, 1] after each step. Then the scales of all channels with m below a threshold become 0. As in the
authors' code

- the network is in training mode meanwhile: noise on dozens of layers would otherwise add up, through the layers that
  follow, to a network whose every image is wrong. Running statistics stay the suspect's;
- pruning leaves biases alone: a channel then says the same of every image, just what m = 0 stood for in the minimum.

Their code takes a random start up to eps and a step of eps without cutting it; the paper's budget is kept here. The
threshold is often chosen by the success of the attack on the test set, which a defender does not have; here the rule is
`defender.strongest`. Networks without BatchNorm have nothing to prune.

Needs: the suspect model and clean images. Costs: three gradients in each iteration.
"""

import time
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from aft_jax.data.augment import augment
from aft_jax.defenses.defender import DefenderData, accuracy, hold_out, strongest
from aft_jax.training.loop import Fitted, Phase, Run, TrainingStage, fit
from aft_jax.training.optimiser import sgd
from aft_jax.training.state import Batch, Metrics
from aft_jax.training.steps import cross_entropy

THRESHOLDS = tuple(i / 20 for i in range(20))  # 0, 0.05, ... 0.95

# Name of a BatchNorm, such as 'stage1_block1/BatchNorm_0' -> [C]
Channels = dict[str, Any]


class Noise(NamedTuple):
    """Relative noise on BatchNorms: what is added to the masks of the scales, and to 1 for the biases."""

    scales: Channels
    biases: Channels


class Pruned(NamedTuple):
    """A purified model that nothing trains any further."""

    variables: dict


@struct.dataclass
class MaskState:
    """Masks in training.

    Attributes:
        step: int32 scalar, iterations done.
        masks: float32 [C] in [0, 1] for each BatchNorm.
        opt_state: The optimiser's state.
    """

    step: jax.Array
    masks: Channels
    opt_state: optax.OptState


class Recipe(NamedTuple):
    """What an iteration of ANP is to do.

    Attributes:
        eps: Budget of the noise, a share of a scale or bias.
        clean_weight: Of the loss without noise; the rest is that with noise.
        augment: `config.augment`.
    """

    eps: float
    clean_weight: float
    augment: ml_collections.ConfigDict


def purify(run: Run, stage: str, data: DefenderData, config: ml_collections.ConfigDict) -> Fitted:
    """Returns the suspect model without the channels that noise can turn against it.

    Args:
        run: The experiment.
        stage: The name of its checkpoints and metrics; what was pruned is written under '<stage>/pruned'.
        data: The defender's.
        config: The resolved config; `config.anp` has iterations, eps, clean_weight and learning_rate.
    """
    options = config.anp
    training, held = hold_out(data, config.tuning.held_out_share, run.seed)
    optimiser = sgd(options.learning_rate, 'constant', options.iterations, config.train.momentum, weight_decay=0.0)
    recipe = Recipe(options.eps, options.clean_weight, config.augment)
    step = partial(mask_step, module=data.module, optimiser=optimiser, recipe=recipe)
    before = begin_masks(data.variables, optimiser)
    phases = [Phase(step, options.iterations)]
    masks_stage = TrainingStage(
        stage, before, phases, training.arrays, config.batch_size, constants=data.variables, trains_model=False
    )
    fitted = fit(run, masks_stage)

    started = time.monotonic()
    masks = jax.device_get(fitted.state.masks)
    candidates = [prune(data.variables, masks, threshold) for threshold in THRESHOLDS]
    accuracies = [accuracy(run, held, candidate) for candidate in candidates]
    # Nothing lies below the first threshold, so the first candidate is the suspect.
    chosen = strongest(accuracies, config.tuning.budget)
    below = np.concatenate([mask < THRESHOLDS[chosen] for mask in masks.values()])
    run.writer.rewind(f'{stage}/pruned', -1)
    record = {'threshold': THRESHOLDS[chosen], 'pruned_share': float(below.mean())}
    run.writer.write(f'{stage}/pruned', options.iterations, record | {'held_out_accuracy': accuracies[chosen]})
    return Fitted(Pruned(candidates[chosen]), fitted.seconds + time.monotonic() - started)


def begin_masks(variables: dict, optimiser: optax.GradientTransformation) -> MaskState:
    """Returns the state before the first iteration, every mask 1, for a model with these variables."""
    params, statistics = (flatten_dict(variables[kind], sep='/') for kind in ('params', 'batch_stats'))
    norms = [name.removesuffix('/mean') for name in statistics if name.endswith('/mean')]
    masks = {norm: jnp.ones_like(params[f'{norm}/scale']) for norm in norms}
    return MaskState(jnp.zeros((), jnp.int32), masks, optimiser.init(masks))


def scaled(params: dict, scales: Channels, biases: Channels) -> dict:
    """Returns the parameters with each BatchNorm's scale and bias multiplied by these, [C] each."""
    flat = dict(flatten_dict(params, sep='/'))
    for norm, factor in scales.items():
        flat[f'{norm}/scale'] = flat[f'{norm}/scale'] * factor
    for norm, factor in biases.items():
        flat[f'{norm}/bias'] = flat[f'{norm}/bias'] * factor
    return unflatten_dict(flat, sep='/')


def prune(variables: dict, masks: Channels, threshold: float) -> dict:
    """Returns the model's variables with the scales of all channels whose mask is below the threshold set to zero."""
    kept = {norm: (mask >= threshold).astype(np.float32) for norm, mask in masks.items()}
    return variables | {'params': scaled(variables['params'], kept, {})}


def mask_step(
    state: MaskState,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    recipe: Recipe,
) -> tuple[MaskState, Metrics]:
    """One iteration: noise up the loss, then the masks down it.

    Args:
        state: Before the iteration.
        batch: 'images' float32 [B, H, W, C] in [0, 1], 'labels' int32 [B], and 'fixed', the suspect's variables.
        key: PRNG key of this iteration.
        module: The classifier.
        optimiser: Of the masks.
        recipe: What to do.

    Returns:
        The state after the iteration; metrics with 'clean_loss', 'noisy_loss' and 'mask', the mean of all masks.
    """
    augment_key, noise_key, dropout_key = jax.random.split(key, 3)
    suspect = batch['constants']
    images = augment(augment_key, batch['images'], recipe.augment)

    def loss(scales: Channels, biases: Channels) -> jax.Array:
        params = scaled(suspect['params'], scales, biases)
        return cross_entropy(training_logits(module, suspect, params, images, dropout_key), batch['labels'])

    def noisy_loss(masks: Channels, noise: Noise) -> jax.Array:
        return loss(jax.tree.map(jnp.add, masks, noise.scales), jax.tree.map(lambda e: 1 + e, noise.biases))

    start = random_noise(noise_key, state.masks, recipe.eps)
    uphill = jax.grad(noisy_loss, argnums=1)(state.masks, start)
    noise = jax.tree.map(lambda n, g: jnp.clip(n + recipe.eps * jnp.sign(g), -recipe.eps, recipe.eps), start, uphill)

    def objective(masks: Channels) -> tuple[jax.Array, Metrics]:
        clean, noisy = loss(masks, {}), noisy_loss(masks, noise)
        value = recipe.clean_weight * clean + (1 - recipe.clean_weight) * noisy
        return value, {'loss': value, 'clean_loss': clean, 'noisy_loss': noisy}

    gradient, metrics = jax.grad(objective, has_aux=True)(state.masks)
    updates, opt_state = optimiser.update(gradient, state.opt_state, state.masks)
    masks = jax.tree.map(lambda m, u: jnp.clip(m + u, 0.0, 1.0), state.masks, updates)
    metrics['mask'] = jnp.concatenate(jax.tree.leaves(masks)).mean()
    return MaskState(state.step + 1, masks, opt_state), metrics


def random_noise(key: jax.Array, masks: Channels, eps: float) -> Noise:
    """Returns noise drawn evenly from [-eps, eps], of the masks' shapes."""

    def draw(key: jax.Array) -> Channels:
        return {
            norm: jax.random.uniform(jax.random.fold_in(key, i), mask.shape, minval=-eps, maxval=eps)
            for i, (norm, mask) in enumerate(sorted(masks.items()))
        }

    first, second = jax.random.split(key)
    return Noise(draw(first), draw(second))


def training_logits(module: nn.Module, suspect: dict, params: dict, images: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the logits [B, K] in training mode, with the batch's statistics; the running ones are not kept."""
    logits, _ = module.apply(
        {'params': params, 'batch_stats': suspect['batch_stats']},
        images,
        train=True,
        mutable=['batch_stats'],
        rngs={'dropout': key},
    )
    return logits
