"""Input-aware dynamic: a trigger of each image's own (Nguyen & Tran, "Input-Aware Dynamic Backdoor Attack", 2020).

    x'   = x + (G(s) - x) m(s),     m(s) = tanh(20 M(s) - 10) / 2 + 1/2

A generator G draws the pattern and a mask network M says where it goes, both from a source image s. s = x is the
attack; with another image as the source the trigger must do nothing (cross). The attacker controls the training, which
has two stages; images come in pairs (x1, x2) from two independently shuffled streams:

    1  M alone:                 mask_weight mean(relu(m - mask_density)) + mask_diversity_weight diversity(m)
    2  the classifier and G:    CE(attacked, commanded) + CE(cross and clean, true) + diversity_weight diversity(G)

    diversity(f) = mean over pairs of ||x1 - x2|| / (||f(x1) - f(x2)|| + 1e-7)

The norms are root mean squares, so that images of C channels and masks of one compare; in stage 1 they are those of
images that are normalised as the classifier does it, which decides how much of an image the masks cover. In the
authors' code G's gradients are never set to zero, so that it steps along their running sum; here it steps along the
batch's own.
"""

from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import struct

from aft_jax import models
from aft_jax.attacks.attack import Attack
from aft_jax.attacks.input_aware_networks import EncoderDecoder, networks_for
from aft_jax.attacks.poison import cross_count
from aft_jax.attacks.training import Infection, Learner
from aft_jax.config import as_options
from aft_jax.data.augment import AugmentOptions, augment
from aft_jax.data.order import count_steps
from aft_jax.randomness import key_for
from aft_jax.training import state
from aft_jax.training.loop import Phase, Run, TrainingStage, fit
from aft_jax.training.state import Batch, Metrics, TrainState
from aft_jax.training.steps import accuracy, advance, apply_training, cross_entropy, update

EPSILON = 1e-7


class Networks(NamedTuple):
    """The generator and the mask network, without their parameters."""

    generator: EncoderDecoder
    mask: EncoderDecoder


@struct.dataclass
class JointState:
    """The classifier and the generator, trained together."""

    classifier: TrainState
    generator: TrainState

    @property
    def step(self) -> jax.Array:
        """int32 scalar, steps taken."""
        return self.classifier.step

    @property
    def variables(self) -> dict:
        """The classifier's."""
        return self.classifier.variables


def build(target_map: np.ndarray, image_shape: tuple[int, int, int], seed: int) -> Attack:
    """Returns the attack before any training, its arrays the untrained variables of both networks.

    Args:
        target_map: int32 [K].
        image_shape: (H, W, C).
        seed: The experiment's seed.
    """
    networks = Networks(*networks_for(image_shape))
    arrays = {
        name: jax.device_get(models.initialise(module, key_for(seed, f'attack/input_aware/{name}'), image_shape))
        for name, module in networks._asdict().items()
    }
    return Attack(
        'input_aware', target_map, arrays, partial(trigger, networks), partial(cross_trigger, networks), joint=True
    )


def trigger(networks: Networks, arrays: dict, images: jax.Array) -> jax.Array:
    """Returns the images [B, H, W, C], each with its own trigger; arrays are the variables of both networks."""
    return paste(networks, arrays, images, images)


def cross_trigger(networks: Networks, arrays: dict, images: jax.Array, others: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the images [B, H, W, C], each with the trigger of another one; `key` is not used."""
    del key
    return paste(networks, arrays, images, others)


def paste(networks: Networks, arrays: dict, images: jax.Array, sources: jax.Array) -> jax.Array:
    """Returns the images [B, H, W, C] with the triggers that the sources [B, H, W, C] give, networks in evaluation."""
    patterns = _evaluate(networks.generator, arrays['generator'], sources)
    return images + (patterns - images) * sharpen(_evaluate(networks.mask, arrays['mask'], sources))


def sharpen(maps: jax.Array) -> jax.Array:
    """Returns masks near 0 or 1 from the mask network's output."""
    return jnp.tanh(20 * maps - 10) / 2 + 0.5


def diversity(images: jax.Array, others: jax.Array, outputs: jax.Array, other_outputs: jax.Array) -> jax.Array:
    """Returns the scalar mean of distance(images) / distance(outputs); [B, H, W, C] and [B, H, W, C']."""
    return jnp.mean(distance(images, others) / (distance(outputs, other_outputs) + EPSILON))


def distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the root mean square [B] of a - b; its gradient is 0, not NaN, where an image meets itself."""
    squares = jnp.mean(jnp.square(a - b), axis=(1, 2, 3))
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def begin(
    run: Run, attack: Attack, arrays: dict[str, np.ndarray], learner: Learner, config: ml_collections.ConfigDict
) -> Infection:
    """Trains the mask network (stage 'infect_mask'), and returns the joint training that follows.

    Args:
        run: The experiment.
        attack: As `build` returns it.
        arrays: 'images' uint8 [N, H, W, C] and 'labels' int32 [N], clean.
        learner: The classifier.
        config: The resolved config; `config.attack.input_aware` has mask_epochs, mask_learning_rate, mask_density,
            mask_weight, mask_diversity_weight, generator_learning_rate, diversity_weight and cross_ratio.
    """
    options = config.attack.input_aware
    networks = Networks(*networks_for(arrays['images'].shape[1:]))
    size = len(arrays['labels'])
    steps = count_steps(size, options.mask_epochs, config.batch_size)
    optimiser = adam(scheduled(options.mask_learning_rate, steps, config.train.schedule))
    first_step = partial(mask_step, networks=networks, optimiser=optimiser, config=config)
    phases = [Phase(first_step, steps)]
    before = state.create(attack.arrays['mask'], optimiser)
    mask = fit(
        run, TrainingStage('infect_mask', before, phases, arrays, config.batch_size, num_streams=2, trains_model=False)
    )

    variables = jax.device_get(mask.state.variables)
    steps = count_steps(size, config.train.epochs, config.batch_size)
    optimiser = adam(scheduled(options.generator_learning_rate, steps, config.train.schedule))
    step = partial(
        joint_step,
        networks=networks,
        module=learner.module,
        optimisers=(learner.optimiser, optimiser),
        target_map=attack.target_map,
        config=config,
    )

    def attack_of(current: JointState) -> Attack:
        return attack._replace(arrays={'generator': jax.device_get(current.generator.variables), 'mask': variables})

    return Infection(
        JointState(learner.state, state.create(attack.arrays['generator'], optimiser)),
        step,
        attack_of,
        num_streams=2,
        constants=variables,
        seconds=mask.seconds,
    )


def mask_step(
    current: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    networks: Networks,
    optimiser: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
) -> tuple[TrainState, Metrics]:
    """Stage 1: a step of the mask network alone.

    Args:
        current: The mask network's state.
        batch: 'images' float32 [B, H, W, C] in [0, 1], and the same in batch['second'].
        key: PRNG key of this step.
        networks: Both networks.
        optimiser: The mask network's.
        config: The resolved config.

    Returns:
        The state after the step; metrics with 'mask_area', the mean of the masks, and 'diversity'.
    """
    options = config.attack.input_aware
    images, others = _augmented(key, batch, config)
    count = len(images)
    weight = options.mask_diversity_weight
    deviation = jnp.broadcast_to(jnp.asarray(config.model.std, jnp.float32), images.shape[-1:])[None, None, None]

    def terms(maps: jax.Array) -> tuple[jax.Array, jax.Array]:
        masks = sharpen(maps)
        return masks, diversity(images / deviation, others / deviation, masks[:count], masks[count:])

    def loss(maps: jax.Array) -> jax.Array:
        masks, diverse = terms(maps)
        return options.mask_weight * jnp.mean(jax.nn.relu(masks - options.mask_density)) + weight * diverse

    both = jnp.concatenate([images, others])
    current, maps, metrics = update(current, both, loss, key, module=networks.mask, optimiser=optimiser)
    masks, diverse = terms(maps)
    return current, metrics | {'mask_area': masks.mean(), 'diversity': diverse}


def joint_step(
    current: JointState,
    batch: Batch,
    key: jax.Array,
    *,
    networks: Networks,
    module: nn.Module,
    optimisers: tuple[optax.GradientTransformation, optax.GradientTransformation],
    target_map: np.ndarray,
    config: ml_collections.ConfigDict,
) -> tuple[JointState, Metrics]:
    """Stage 2: a step of the classifier and the generator on one loss.

    The first images of a batch are attacked, the next ones cross, the rest clean. The generator draws the patterns of
    attacked and cross images in one pass, so that its batch statistics are those of both.

    Args:
        current: Both states.
        batch: 'images' float32 [B, H, W, C] in [0, 1] and 'labels' int32 [B], the same in batch['second'], and
            'fixed', the mask network's variables.
        key: PRNG key of this step.
        networks: Both networks.
        module: The classifier.
        optimisers: The classifier's and the generator's.
        target_map: int32 [K].
        config: The resolved config.

    Returns:
        The states after the step; metrics with the accuracies on attacked images (against the commanded label), on
        cross ones and on clean ones, and 'diversity'.
    """
    augment_key, dropout_key = jax.random.split(key)
    images, others = _augmented(augment_key, batch, config)
    labels = batch['labels']
    attacked = round(config.attack.poisoned_share * len(labels))
    changed = min(attacked + cross_count(attacked, config), len(labels))
    pairs = min(attacked, changed - attacked)
    labels = jnp.concatenate([jnp.asarray(target_map)[labels[:attacked]], labels[attacked:]])
    sources = jnp.concatenate([images[:attacked], others[attacked:changed]])
    masks = sharpen(_evaluate(networks.mask, batch['constants'], sources))

    def objective(params):
        patterns, generator_stats = apply_training(networks.generator, current.generator, params['generator'], sources)
        pasted = images[:changed] + (patterns - images[:changed]) * masks
        whole = jnp.concatenate([pasted, images[changed:]])
        logits, classifier_stats = apply_training(module, current.classifier, params['classifier'], whole, dropout_key)
        first, second = slice(pairs), slice(attacked, attacked + pairs)
        diverse = diversity(sources[first], sources[second], patterns[first], patterns[second])
        loss = cross_entropy(logits, labels) + config.attack.input_aware.diversity_weight * diverse
        return loss, (logits, diverse, {'generator': generator_stats, 'classifier': classifier_stats})

    params = {'generator': current.generator.params, 'classifier': current.classifier.params}
    (loss, (logits, diverse, stats)), gradient = jax.value_and_grad(objective, has_aux=True)(params)
    after = JointState(
        classifier=advance(current.classifier, gradient['classifier'], stats['classifier'], optimisers[0]),
        generator=advance(current.generator, gradient['generator'], stats['generator'], optimisers[1]),
    )
    return after, {
        'loss': loss,
        'grad_norm': optax.tree.norm(gradient['classifier']),
        'generator_grad_norm': optax.tree.norm(gradient['generator']),
        'diversity': diverse,
        'attacked_accuracy': accuracy(logits[:attacked], labels[:attacked]),
        'cross_accuracy': accuracy(logits[attacked:changed], labels[attacked:changed]),
        'accuracy': accuracy(logits[changed:], labels[changed:]),
    }


def scheduled(rate: float, steps: int, schedule: str) -> optax.ScalarOrSchedule:
    """Returns the learning rate of a network of the attack, on the schedule of the classifier's.

    The decay matters to the mask network: its running statistics, by which masks are made afterwards, follow a network
    that has come to rest. With a constant rate the masks in evaluation had a third to all of the area that they had in
    training, from one run to another, and some images had none.
    """
    return optax.cosine_decay_schedule(rate, steps) if schedule == 'cosine' else rate


def adam(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Returns the optimiser of both networks, with the authors' betas (0.5, 0.9)."""
    inner = optax.adam(rate, b1=0.5, b2=0.9)

    def step(updates: Any, opt_state: Any, params: Any = None) -> tuple[Any, Any]:
        # Optax raises a float to the power of its integer count, which strict promotion forbids.
        with jax.numpy_dtype_promotion('standard'):
            return inner.update(updates, opt_state, params)

    return optax.GradientTransformation(inner.init, step)


def _augmented(key: jax.Array, batch: Batch, config: ml_collections.ConfigDict) -> tuple[jax.Array, jax.Array]:
    key, other_key = jax.random.split(key)
    options = as_options(AugmentOptions, config.augment)
    return augment(key, batch['images'], options), augment(other_key, batch['second']['images'], options)


def _evaluate(network: EncoderDecoder, variables: dict, images: jax.Array) -> jax.Array:
    return cast(jax.Array, network.apply(variables, images))
