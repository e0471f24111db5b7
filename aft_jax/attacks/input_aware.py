"""Input-aware dynamic: a different trigger for each image (Nguyen & Tran, "Input-Aware Dynamic Backdoor Attack", 2020).

    x'   = x + (G(s) - x) m(s),     m(s) = tanh(20 M(s) - 10) / 2 + 1/2

A generator G makes the pattern and a mask network M says where it goes, both from a source image s. The attack takes
s = x. With another image as the source the trigger must do nothing (cross mode). The attacker controls the training,
which has two stages (`aft_jax.attacks.input_aware_training`). Images come in pairs (x1, x2) from two independently
shuffled streams:

    1  M alone:                 mask_weight mean(relu(m - mask_density)) + mask_diversity_weight diversity(m)
    2  the classifier and G:    CE(attacked, target) + CE(cross and clean, true) + diversity_weight diversity(G)

    diversity(f) = mean over pairs of ||x1 - x2|| / (||f(x1) - f(x2)|| + 1e-7)

The norms are root mean squares, so that images of C channels and masks of one channel are comparable. Stage 1 takes the
norms of images that are normalised as for the classifier. This decides how much of an image the masks cover.
In the authors' code the gradients of G are never set to zero, so that it steps along their running sum. Here it steps
along the gradient of the current batch.
"""

from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from aft_jax import models
from aft_jax.attacks.attack import Attack
from aft_jax.attacks.input_aware_networks import EncoderDecoder, networks_for
from aft_jax.randomness import key_for

EPSILON = 1e-7


class InputAwareOptions(NamedTuple):
    """Section `attack.input_aware` of the config, without the cross_ratio (see `aft_jax.attacks.poison`).

    Attributes:
        mask_epochs: Epochs of stage 1.
        mask_learning_rate: Learning rate of the mask network.
        mask_density: Share of the image that the mask may cover at no cost.
        mask_weight: Weight of the cost of larger masks.
        mask_diversity_weight: Weight of the masks' diversity.
        generator_learning_rate: Learning rate of the generator.
        diversity_weight: Weight of the patterns' diversity.
    """

    mask_epochs: float
    mask_learning_rate: float
    mask_density: float
    mask_weight: float
    mask_diversity_weight: float
    generator_learning_rate: float
    diversity_weight: float


class Networks(NamedTuple):
    """The generator and the mask network, without their variables."""

    generator: EncoderDecoder
    mask: EncoderDecoder


def build(target_map: np.ndarray, image_shape: tuple[int, int, int], seed: int) -> Attack:
    """Builds the attack before any training. Its arrays are the untrained variables of both networks.

    Args:
        target_map: int32 [K], target label of each true class.
        image_shape: (H, W, C).
        seed: Seed of the experiment.
    """
    networks = Networks(*networks_for(image_shape))
    arrays = {
        name: jax.device_get(models.initialise(module, key_for(seed, f'attack/input_aware/{name}'), image_shape))
        for name, module in networks._asdict().items()
    }
    return Attack(
        'input_aware',
        target_map,
        arrays,
        partial(trigger, networks),
        partial(cross_trigger, networks),
        trigger_is_trained=True,
    )


def trigger(networks: Networks, arrays: dict, images: jax.Array) -> jax.Array:
    """Pastes its own trigger on each of the images [B, H, W, C]. The arrays are the variables of both networks."""
    return paste(networks, arrays, images, images)


def cross_trigger(networks: Networks, arrays: dict, images: jax.Array, others: jax.Array, key: jax.Array) -> jax.Array:
    """Pastes the trigger of another image on each of the images [B, H, W, C]; `key` is not used."""
    del key
    return paste(networks, arrays, images, others)


def paste(networks: Networks, arrays: dict, images: jax.Array, sources: jax.Array) -> jax.Array:
    """Pastes the triggers of `sources` on `images`, both [B, H, W, C], with both networks in evaluation mode."""
    patterns = evaluate(networks.generator, arrays['generator'], sources)
    return images + (patterns - images) * sharpen(evaluate(networks.mask, arrays['mask'], sources))


def evaluate(network: EncoderDecoder, variables: dict, images: jax.Array) -> jax.Array:
    """Applies a network in evaluation mode."""
    return cast(jax.Array, network.apply(variables, images))


def sharpen(maps: jax.Array) -> jax.Array:
    """Converts the mask network's output to masks near 0 or 1."""
    return jnp.tanh(20 * maps - 10) / 2 + 0.5


def diversity(images: jax.Array, others: jax.Array, outputs: jax.Array, other_outputs: jax.Array) -> jax.Array:
    """Computes the scalar mean of distance(images) / distance(outputs), for [B, H, W, C] and [B, H, W, C']."""
    return jnp.mean(distance(images, others) / (distance(outputs, other_outputs) + EPSILON))


def distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes the root mean square [B] of a - b. Its gradient is 0, not NaN, for an image paired with itself."""
    squares = jnp.mean(jnp.square(a - b), axis=(1, 2, 3))
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
