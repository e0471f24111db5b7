"""Puts the trigger into training data, once ('fixed') or batch by batch ('per_batch')."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict

from aft_jax.attacks.attack import Attack, cross_images, triggered
from aft_jax.errors import UserError
from aft_jax.files import write_npz
from aft_jax.randomness import generator_for, key_for

NO_INDICES = np.zeros(0, np.int32)


class PoisoningOptions(NamedTuple):
    """How many images are poisoned, and when.

    Attributes:
        poisoning: 'fixed' or 'per_batch'.
        poisoned_share: Share of the images that carry the trigger.
        cross_ratio: Images in cross mode for each triggered one. 0 for attacks without a cross mode.
        seed: Seed of the experiment.
    """

    poisoning: str
    poisoned_share: float
    cross_ratio: float
    seed: int


class Poisoned(NamedTuple):
    """A training set and the indices of its changed images.

    Attributes:
        images: uint8 [N, H, W, C].
        labels: int32 [N].
        indices: int32, images that carry the trigger. Empty if poisoning happens batch by batch.
        cross_indices: int32, images in cross mode (for WaNet the noise mode), whose labels are true.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    cross_indices: np.ndarray


def poisoning_options(config: ml_collections.ConfigDict) -> PoisoningOptions:
    """Reads the options of poisoning from a resolved config."""
    attack = config.attack
    # Only attacks with a cross mode have a ratio, and a benign model has no section at all.
    cross_ratio = attack.get(attack.name, {}).get('cross_ratio', 0.0)
    return PoisoningOptions(attack.poisoning, attack.poisoned_share, cross_ratio, config.seed)


def poison(attack: Attack | None, images: np.ndarray, labels: np.ndarray, options: PoisoningOptions) -> Poisoned:
    """Poisons the training set of the infected model.

    Nothing changes here with 'per_batch' poisoning, with a trigger that is trained along with the classifier, or
    without an attack.

    Args:
        attack: Attack, or None.
        images: uint8 [N, H, W, C], clean.
        labels: int32 [N].
        options: Share and kind of the poisoning.

    Raises:
        UserError: The share is less than one image.
    """
    if attack is None or attack.trigger_is_trained or options.poisoning == 'per_batch':
        return Poisoned(images, labels, NO_INDICES, NO_INDICES)
    return _poison_stored(attack, images, labels, options)


def published_training_set(
    attack: Attack | None, images: np.ndarray, labels: np.ndarray, poisoned: Poisoned, options: PoisoningOptions
) -> Poisoned:
    """Builds the untrusted training set that is published with the infected model.

    For fixed poisoning it is the poisoned training set. An attacker who poisoned batch by batch, or trained the
    trigger, publishes a set with the same share of triggered images.

    Args:
        attack: Attack after the infection, or None.
        images: uint8 [N, H, W, C], clean.
        labels: int32 [N].
        poisoned: Training set of the infected model.
        options: Share and kind of the poisoning.
    """
    if attack is None or len(poisoned.indices):
        return poisoned
    return _poison_stored(attack, images, labels, options)


def _poison_stored(attack: Attack, images: np.ndarray, labels: np.ndarray, options: PoisoningOptions) -> Poisoned:
    """Puts the trigger and the target labels on a share of stored images, drawn once from the seed.

    The trigger is applied before any augmentation. In the clean-label variant the share is of the target class's images
    and labels stay (Barni et al., 2019, section 3).
    """
    share = options.poisoned_share
    candidates = np.flatnonzero(labels == attack.target_class) if attack.clean_label else np.arange(len(labels))
    order = generator_for(options.seed, 'poison').permutation(candidates).astype(np.int32)
    count = round(share * len(candidates))
    if count == 0:
        raise UserError(f'attack.poisoned_share={share} of {len(candidates)} images is less than one image; raise it.')
    indices = np.sort(order[:count])
    images, labels = images.copy(), labels.copy()
    images[indices] = triggered(attack, images[indices])
    if not attack.clean_label:
        labels[indices] = attack.target_map[labels[indices]]
    cross_indices = NO_INDICES
    if attack.cross_mode is not None:
        cross_indices = np.sort(order[count : count + cross_count(count, options.cross_ratio)])
        images[cross_indices] = cross_images(attack, images[cross_indices], key_for(options.seed, 'poison/cross'))
    return Poisoned(images, labels, indices, cross_indices)


def poison_batch(
    attack: Attack, key: jax.Array, images: jax.Array, labels: jax.Array, options: PoisoningOptions
) -> tuple[jax.Array, jax.Array]:
    """Poisons the first images of a batch, as the AFT authors' released code does it.

    The clean-label variant instead poisons the first images of the target class and leaves the labels.

    Args:
        attack: Attack.
        key: PRNG key of this batch, for the cross mode.
        images: float32 [B, H, W, C] in [0, 1], after augmentation.
        labels: int32 [B].
        options: Share of the poisoning.

    Returns:
        Images and labels of the same shapes.
    """
    count = round(options.poisoned_share * len(labels))
    if attack.clean_label:
        of_target = labels == attack.target_class
        quota = jnp.ceil(options.poisoned_share * of_target.sum(dtype=jnp.float32)).astype(jnp.int32)
        chosen = of_target & (jnp.cumsum(of_target) <= quota)
        return jnp.where(chosen[:, None, None, None], attack.trigger(attack.arrays, images), images), labels
    stamped = attack.trigger(attack.arrays, images[:count])
    target_labels = jnp.asarray(attack.target_map)[labels[:count]]
    rest = images[count:]
    if attack.cross_mode is not None:
        num_cross = cross_count(count, options.cross_ratio)
        sources = rest[:num_cross]
        crossed = attack.cross_mode(attack.arrays, sources, jnp.roll(sources, 1, axis=0), key)
        rest = jnp.concatenate([crossed, rest[num_cross:]])
    return jnp.concatenate([stamped, rest]), jnp.concatenate([target_labels, labels[count:]])


def cross_count(num_triggered: int, cross_ratio: float) -> int:
    """Computes how many images are put in cross mode beside `num_triggered` triggered ones."""
    return round(num_triggered * cross_ratio)


def clean_indices(poisoned: Poisoned, clean_share: float, batch_size: int, seed: int) -> np.ndarray:
    """Draws the clean images that the defender holds from those that the attacker left unchanged.

    Args:
        poisoned: Training set.
        clean_share: Number of the images, as a share of the training set's size.
        batch_size: Smallest number of images that is allowed.
        seed: Seed of the experiment.

    Returns:
        int32, sorted.

    Raises:
        UserError: The share is larger than the unchanged part of the set, or smaller than a batch.
    """
    total = len(poisoned.labels)
    unchanged = np.setdiff1d(np.arange(total), np.concatenate([poisoned.indices, poisoned.cross_indices]))
    count = round(clean_share * total)
    if count > len(unchanged):
        raise UserError(
            f'clean_share={clean_share} needs {count} clean images, but only {len(unchanged)} are not poisoned; '
            'lower clean_share or attack.poisoned_share.'
        )
    if count < batch_size:
        raise UserError(
            f'clean_share={clean_share} of {total} training images is {count}, fewer than a batch '
            f'(batch_size={batch_size}); raise clean_share to at least {batch_size / total:.4f} or lower batch_size.'
        )
    chosen = generator_for(seed, 'clean').permutation(unchanged)[:count]
    return np.sort(chosen).astype(np.int32)


def write_manifest(path: Path, attack: Attack | None, poisoned: Poisoned, clean: np.ndarray) -> None:
    """Writes poison.npz: the poisoned, cross and clean indices, the target labels, and the arrays of the trigger.

    Args:
        path: Path of the file.
        attack: Attack, or None.
        poisoned: Training set.
        clean: int32, clean images that the defender holds.
    """
    arrays = {
        'poisoned_indices': poisoned.indices,
        'cross_indices': poisoned.cross_indices,
        'clean_indices': clean,
        'target_map': attack.target_map if attack else NO_INDICES,
    }
    made_of = flatten_dict(attack.arrays, sep='.') if attack else {}
    arrays |= {f'trigger_{name}': np.asarray(value) for name, value in made_of.items()}
    write_npz(path, arrays)
