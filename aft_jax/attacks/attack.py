"""What every attack is: a trigger and the labels that it commands."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LABEL_MODES = ('all2one', 'all2all')


class Attack(NamedTuple):
    """A backdoor attack on images of one shape.

    Attributes:
        name: Such as 'badnets'.
        target_map: int32 [K], the label that the trigger commands for each true class.
        arrays: What the trigger is made of, by name; kept in the poison manifest.
        trigger: (arrays, images) -> images, float32 [B, H, W, C] in [0, 1]; pure, of each image alone.
        cross: (arrays, images, key) -> images that look attacked but keep their true label (WaNet's noise mode);
            None where an attack has no such thing.
        clean_label: Whether only images of the target class are poisoned and labels stay.
    """

    name: str
    target_map: np.ndarray
    arrays: dict[str, np.ndarray]
    trigger: Callable[[dict, jax.Array], jax.Array]
    cross: Callable[[dict, jax.Array, jax.Array], jax.Array] | None = None
    clean_label: bool = False


def target_map(label_mode: str, target: int, num_classes: int) -> np.ndarray:
    """Returns int32 [K]: `target` everywhere (all2one), or y -> (y + 1) mod K (all2all)."""
    if label_mode == 'all2one':
        return np.full(num_classes, target, np.int32)
    return ((np.arange(num_classes) + 1) % num_classes).astype(np.int32)


def triggered(attack: Attack, images: np.ndarray, chunk: int = 1000) -> np.ndarray:
    """Returns stored images with the trigger, rounded to bytes as an attacker would store them.

    Args:
        attack: The attack.
        images: uint8 [N, H, W, C].
        chunk: Images in one compiled call.

    Returns:
        uint8 [N, H, W, C].
    """
    return _in_chunks(attack.arrays, images, chunk, lambda arrays, x, _: attack.trigger(arrays, x))


def crossed(attack: Attack, images: np.ndarray, key: jax.Array, chunk: int = 1000) -> np.ndarray:
    """Returns stored images in the attack's noise mode, rounded to bytes; uint8 [N, H, W, C] as given."""
    cross = attack.cross
    if cross is None:
        raise ValueError(f'the attack {attack.name} has no noise mode')
    return _in_chunks(attack.arrays, images, chunk, lambda arrays, x, i: cross(arrays, x, jax.random.fold_in(key, i)))


def _in_chunks(arrays: dict, images: np.ndarray, chunk: int, function: Callable) -> np.ndarray:
    @jax.jit
    def apply(arrays, part, index):
        changed = function(arrays, part.astype(jnp.float32) / 255.0, index)
        return jnp.round(jnp.clip(changed, 0.0, 1.0) * 255.0).astype(jnp.uint8)

    out = np.empty_like(images)
    for index, first in enumerate(range(0, len(images), chunk)):
        part = images[first : first + chunk]
        padding = np.zeros((min(chunk, len(images)) - len(part), *images.shape[1:]), np.uint8)
        out[first : first + chunk] = np.asarray(apply(arrays, np.concatenate([part, padding]), index))[: len(part)]
    return out
