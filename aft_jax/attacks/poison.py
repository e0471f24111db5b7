"""Putting the trigger into training data, once ('fixed') or batch by batch ('per_batch')."""

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


class Poisoned(NamedTuple):
    """A training set and which of its images were changed.

    Attributes:
        images: uint8 [N, H, W, C].
        labels: int32 [N].
        indices: int32, the images that carry the trigger; empty when poisoning happens batch by batch.
        cross_indices: int32, the images in noise mode, whose labels are true.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    cross_indices: np.ndarray


NO_INDICES = np.zeros(0, np.int32)


def poison(
    attack: Attack | None, images: np.ndarray, labels: np.ndarray, config: ml_collections.ConfigDict
) -> Poisoned:
    """Returns the training set that the infected model is trained on.

    With `poisoning='fixed'` a share of the images, drawn once from the seed, carries the trigger (before any
    augmentation) and the commanded label. In the clean-label variant the share is of the target class's images
    and labels stay (Barni et al., 2019, section 3). With 'per_batch', with a trigger that is trained along with the
    classifier, or without an attack, nothing changes here.

    Args:
        attack: The attack, or None.
        images: uint8 [N, H, W, C], clean.
        labels: int32 [N].
        config: The resolved config.

    Raises:
        UserError: The share is less than one image.
    """
    if attack is None or attack.joint or config.attack.poisoning == 'per_batch':
        return Poisoned(images, labels, NO_INDICES, NO_INDICES)
    share = config.attack.poisoned_share
    candidates = np.flatnonzero(labels == attack.target_map[0]) if attack.clean_label else np.arange(len(labels))
    order = generator_for(config.seed, 'poison').permutation(candidates).astype(np.int32)
    count = round(share * len(candidates))
    if count == 0:
        raise UserError(f'attack.poisoned_share={share} of {len(candidates)} images is less than one image; raise it.')
    indices = np.sort(order[:count])
    images, labels = images.copy(), labels.copy()
    images[indices] = triggered(attack, images[indices])
    if not attack.clean_label:
        labels[indices] = attack.target_map[labels[indices]]
    cross_indices = NO_INDICES
    if attack.cross is not None:
        cross_indices = np.sort(order[count : count + cross_count(count, config)])
        images[cross_indices] = cross_images(attack, images[cross_indices], key_for(config.seed, 'poison/cross'))
    return Poisoned(images, labels, indices, cross_indices)


def published_training_set(
    attack: Attack | None, images: np.ndarray, labels: np.ndarray, poisoned: Poisoned, config: ml_collections.ConfigDict
) -> Poisoned:
    """Returns the training set that a defender finds beside a suspect model.

    It is the poisoned one. An attacker who poisoned batch by batch, or trained the trigger along, leaves the same share
    of the images with the trigger as it came out.

    Args:
        attack: The attack after the infection, or None.
        images: uint8 [N, H, W, C], clean.
        labels: int32 [N].
        poisoned: The training set of the infection.
        config: The resolved config.
    """
    if attack is None or len(poisoned.indices):
        return poisoned
    stored = config.copy_and_resolve_references()
    stored.attack.poisoning = 'fixed'
    return poison(attack._replace(joint=False), images, labels, stored)


def poison_batch(
    attack: Attack, key: jax.Array, images: jax.Array, labels: jax.Array, config: ml_collections.ConfigDict
) -> tuple[jax.Array, jax.Array]:
    """Returns a batch whose first images carry the trigger, as the AFT authors' released code does it.

    Args:
        attack: The attack.
        key: PRNG key of this batch, for the noise mode.
        images: float32 [B, H, W, C] in [0, 1], after augmentation.
        labels: int32 [B].
        config: The resolved config.

    Returns:
        Images and labels of the same shapes. The clean-label variant triggers the share among the batch's
        target-class images by position instead, and leaves the labels.
    """
    count = round(config.attack.poisoned_share * len(labels))
    if attack.clean_label:
        of_target = labels == attack.target_map[0]
        wanted = jnp.ceil(config.attack.poisoned_share * of_target.sum(dtype=jnp.float32)).astype(jnp.int32)
        chosen = of_target & (jnp.cumsum(of_target) <= wanted)
        return jnp.where(chosen[:, None, None, None], attack.trigger(attack.arrays, images), images), labels
    stamped = attack.trigger(attack.arrays, images[:count])
    commanded = jnp.asarray(attack.target_map)[labels[:count]]
    rest = images[count:]
    if attack.cross is not None:
        crossing = cross_count(count, config)
        chosen = rest[:crossing]
        changed = attack.cross(attack.arrays, chosen, jnp.roll(chosen, 1, axis=0), key)
        rest = jnp.concatenate([changed, rest[crossing:]])
    return jnp.concatenate([stamped, rest]), jnp.concatenate([commanded, labels[count:]])


def cross_count(poisoned: int, config: ml_collections.ConfigDict) -> int:
    """Returns how many images go into cross mode (noise mode) beside `poisoned` triggered ones."""
    return round(poisoned * config.attack[config.attack.name].cross_ratio)


def clean_indices(poisoned: Poisoned, config: ml_collections.ConfigDict) -> np.ndarray:
    """Returns the images that the defender is given: a share of the set, drawn from those that were not changed.

    Raises:
        UserError: They are too few for a batch.
    """
    total = len(poisoned.labels)
    untouched = np.setdiff1d(np.arange(total), np.concatenate([poisoned.indices, poisoned.cross_indices]))
    count = round(config.clean_share * total)
    if count > len(untouched):
        raise UserError(
            f'clean_share={config.clean_share} asks for {count} clean images, but only {len(untouched)} were not '
            'poisoned; lower clean_share or attack.poisoned_share.'
        )
    if count < config.batch_size:
        raise UserError(
            f'clean_share={config.clean_share} of {total} training images is {count}, fewer than a batch '
            f'(batch_size={config.batch_size}); raise clean_share to at least {config.batch_size / total:.4f} or lower '
            'batch_size.'
        )
    chosen = generator_for(config.seed, 'clean').permutation(untouched)[:count]
    return np.sort(chosen).astype(np.int32)


def write_manifest(path: Path, attack: Attack | None, poisoned: Poisoned, clean: np.ndarray) -> None:
    """Writes poison.npz: who was poisoned, who is in noise mode, what the trigger commands and is made of.

    Args:
        path: Of the file.
        attack: The attack, or None.
        poisoned: The training set.
        clean: int32, the images that the defender was given.
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
