"""ANP: adversarial neuron pruning (Wu & Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", 2021).

A little noise on the neurons of an infected model makes it predict the target label without any trigger. The neurons
that cause this belong to the backdoor. A neuron is a channel of a BatchNorm, with scale w and bias b, and has a mask m
in [0, 1]:

    min over m of   clean_weight CE(m w, b) + (1 - clean_weight) max over |d|, |e| <= eps of CE((m + d) w, (1 + e) b)

The maximum is approximated by one sign step of length eps from a random start, clipped to the budget. The minimum is
found by SGD with momentum; masks are clipped to [0, 1] after each step. Then the scales of all channels with m below a
threshold become 0. As in the authors' code:

- The network is in training mode, so that BatchNorm removes the effect of noise on earlier layers. Otherwise noise on
  dozens of layers would add up until every image is misclassified. Running statistics stay those of the infected model.
- Pruning leaves biases alone. A pruned channel then has the same value for every image, which is what m = 0 means in
  the minimum.

The authors' code takes a random start up to eps and a step of eps without clipping; the paper's budget is kept here.
The threshold is often chosen by the attack success rate on the test set, which a defender does not have. Here
`defender.strongest` chooses it. Networks without BatchNorm have nothing to prune.

Needs: the infected model and clean images. Costs: three gradients in each iteration.
"""

import time
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from aft_jax.data.augment import AugmentOptions, augment
from aft_jax.defenses.defender import DefenderData, DefenseSettings, Purified, TuningOptions, choose, hold_out
from aft_jax.training.loop import fit
from aft_jax.training.optimiser import sgd
from aft_jax.training.stage import Phase, Run, TrainingStage
from aft_jax.training.state import Batch, Metrics
from aft_jax.training.steps import cross_entropy

THRESHOLDS = tuple(i / 20 for i in range(20))  # 0, 0.05, ... 0.95

# Name of a BatchNorm, such as 'stage1_block1/BatchNorm_0' -> [C]
Channels = dict[str, Any]


class AnpOptions(NamedTuple):
    """Section `anp` of the config.

    Attributes:
        iterations: Steps of the masks' training.
        eps: Budget of the noise, relative to a scale or bias.
        clean_weight: Weight of the loss without noise. The loss with noise has the rest.
        learning_rate: Learning rate of the masks.
    """

    iterations: int
    eps: float
    clean_weight: float
    learning_rate: float


class Noise(NamedTuple):
    """Relative noise on BatchNorms.

    Attributes:
        scales: Terms added to the masks of the scales.
        biases: Terms added to 1, the factor of the biases.
    """

    scales: Channels
    biases: Channels


@struct.dataclass
class MaskState:
    """Masks in training.

    Attributes:
        step: int32 scalar, iterations done.
        masks: float32 [C] in [0, 1] for each BatchNorm.
        opt_state: State of the optimiser.
    """

    step: jax.Array
    masks: Channels
    opt_state: optax.OptState


def purify(run: Run, name: str, data: DefenderData, settings: DefenseSettings) -> Purified:
    """Removes the channels of the infected model that noise can turn against it.

    Args:
        run: Experiment.
        name: Name of checkpoints and metrics. The record of what was pruned is written under '<name>/pruned'.
        data: Infected model and clean images.
        settings: Settings with `AnpOptions`.
    """
    options: AnpOptions = settings.options
    kept, held = hold_out(data, settings.tuning.held_out_share, run.seed)
    momentum = settings.train.momentum
    optimiser = sgd(options.learning_rate, 'constant', options.iterations, momentum=momentum, weight_decay=0.0)
    step = partial(mask_step, module=data.module, optimiser=optimiser, options=options, augmentation=settings.augment)
    stage = TrainingStage(
        name=name,
        state=init_masks(data.variables, optimiser),
        phases=[Phase(step, options.iterations)],
        arrays=kept.arrays,
        batch_size=settings.batch_size,
        constants=data.variables,
        trains_model=False,
    )
    fitted = fit(run, stage)
    variables, record, seconds = prune_strongest(run, held, jax.device_get(fitted.state.masks), settings.tuning)
    run.writer.rewind(f'{name}/pruned', -1)
    run.writer.write(f'{name}/pruned', options.iterations, record)
    return Purified(variables, fitted.seconds + seconds)


def prune_strongest(
    run: Run, held: DefenderData, masks: Channels, tuning: TuningOptions
) -> tuple[dict, dict[str, float], float]:
    """Prunes with the highest threshold that the held-out images allow.

    Args:
        run: Experiment.
        held: Infected model and held-out images.
        masks: float32 [C] for each BatchNorm.
        tuning: Options of the choice.

    Returns:
        The pruned model's variables, the record for metrics.jsonl, and the seconds spent.
    """
    started = time.monotonic()
    # No mask lies below the first threshold, so the first candidate is the infected model.
    candidates = [prune(held.variables, masks, threshold) for threshold in THRESHOLDS]
    choice = choose(run, held, candidates, tuning)
    threshold = THRESHOLDS[choice.chosen]
    below = np.concatenate([mask < threshold for mask in masks.values()])
    record = {'threshold': threshold, 'pruned_share': float(below.mean())}
    record['held_out_accuracy'] = choice.accuracy
    return candidates[choice.chosen], record, time.monotonic() - started


def init_masks(variables: dict, optimiser: optax.GradientTransformation) -> MaskState:
    """Creates the state before the first iteration, with every mask 1, for a model with these variables."""
    params, statistics = (flatten_dict(variables[kind], sep='/') for kind in ('params', 'batch_stats'))
    norms = [name.removesuffix('/mean') for name in statistics if name.endswith('/mean')]
    masks = {norm: jnp.ones_like(params[f'{norm}/scale']) for norm in norms}
    return MaskState(jnp.zeros((), jnp.int32), masks, optimiser.init(masks))


def scaled(params: dict, scales: Channels, biases: Channels) -> dict:
    """Multiplies scales and biases of BatchNorms in the parameters by factors [C]."""
    flat = dict(flatten_dict(params, sep='/'))
    for norm, factor in scales.items():
        flat[f'{norm}/scale'] = flat[f'{norm}/scale'] * factor
    for norm, factor in biases.items():
        flat[f'{norm}/bias'] = flat[f'{norm}/bias'] * factor
    return unflatten_dict(flat, sep='/')


def prune(variables: dict, masks: Channels, threshold: float) -> dict:
    """Sets the scales of all channels whose mask is below the threshold to zero in a model's variables."""
    kept = {norm: (mask >= threshold).astype(np.float32) for norm, mask in masks.items()}
    return variables | {'params': scaled(variables['params'], kept, {})}


def mask_step(
    state: MaskState,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    options: AnpOptions,
    augmentation: AugmentOptions,
) -> tuple[MaskState, Metrics]:
    """Does one iteration: a step of the noise up the loss, then a step of the masks down the loss.

    Args:
        state: Masks before the iteration.
        batch: 'images' float32 [B, H, W, C] in [0, 1], 'labels' int32 [B], and 'constants', the infected model's
            variables.
        key: PRNG key of this iteration.
        module: Classifier.
        optimiser: Optimiser of the masks.
        options: Options of ANP.
        augmentation: Options of `augment`.

    Returns:
        The state after the iteration; metrics with 'clean_loss', 'noisy_loss' and 'mask', the mean of all masks.
    """
    augment_key, noise_key, dropout_key = jax.random.split(key, 3)
    infected = batch['constants']
    images = augment(augment_key, batch['images'], augmentation)

    def loss(scales: Channels, biases: Channels) -> jax.Array:
        params = scaled(infected['params'], scales, biases)
        return cross_entropy(training_logits(module, infected, params, images, dropout_key), batch['labels'])

    def noisy_loss(masks: Channels, noise: Noise) -> jax.Array:
        return loss(jax.tree.map(jnp.add, masks, noise.scales), jax.tree.map(lambda e: 1 + e, noise.biases))

    start = random_noise(noise_key, state.masks, options.eps)
    uphill = jax.grad(noisy_loss, argnums=1)(state.masks, start)
    noise = jax.tree.map(lambda n, g: jnp.clip(n + options.eps * jnp.sign(g), -options.eps, options.eps), start, uphill)

    def objective(masks: Channels) -> tuple[jax.Array, Metrics]:
        clean, noisy = loss(masks, {}), noisy_loss(masks, noise)
        value = options.clean_weight * clean + (1 - options.clean_weight) * noisy
        return value, {'loss': value, 'clean_loss': clean, 'noisy_loss': noisy}

    gradient, metrics = jax.grad(objective, has_aux=True)(state.masks)
    updates, opt_state = optimiser.update(gradient, state.opt_state, state.masks)
    masks = jax.tree.map(lambda m, u: jnp.clip(m + u, 0.0, 1.0), state.masks, updates)
    metrics['mask'] = jnp.concatenate(jax.tree.leaves(masks)).mean()
    return MaskState(state.step + 1, masks, opt_state), metrics


def random_noise(key: jax.Array, masks: Channels, eps: float) -> Noise:
    """Draws noise uniformly from [-eps, eps], in the shapes of the masks."""

    def draw(key: jax.Array) -> Channels:
        return {
            norm: jax.random.uniform(jax.random.fold_in(key, i), mask.shape, minval=-eps, maxval=eps)
            for i, (norm, mask) in enumerate(sorted(masks.items()))
        }

    first, second = jax.random.split(key)
    return Noise(draw(first), draw(second))


def training_logits(module: nn.Module, infected: dict, params: dict, images: jax.Array, key: jax.Array) -> jax.Array:
    """Computes logits [B, K] in training mode, with statistics of the batch. New running statistics are dropped."""
    logits, _ = module.apply(
        {'params': params, 'batch_stats': infected['batch_stats']},
        images,
        train=True,
        mutable=['batch_stats'],
        rngs={'dropout': key},
    )
    return logits
