"""What every attack is: a trigger and the labels that it commands."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LABEL_MODES = ('all2one', 'all2all')


class Attack(NamedTuple):
    """A backdoor attack on images of one shape.

    Attributes:
        name: Such as 'badnets'.
        target_map: int32 [K], the label that the trigger commands for each true class.
        arrays: What the trigger is made of, by name, perhaps nested; kept in the poison manifest.
        trigger: (arrays, images) -> images, float32 [B, H, W, C] in [0, 1]; pure, of each image alone.
        cross: (arrays, images, others, key) -> images that look attacked but keep their true label: WaNet's noise
            mode, which draws from the key, or the triggers that the input-aware attack makes of `others`, as many
            further images. None where an attack has no such thing.
        clean_label: Whether only images of the target class are poisoned and labels stay.
        joint: Whether trigger and classifier are trained together, batch by batch, so that `arrays` are final only
            after that and no stored image is poisoned.
    """

    name: str
    target_map: np.ndarray
    arrays: dict[str, Any]
    trigger: Callable[[dict, jax.Array], jax.Array]
    cross: Callable[[dict, jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    clean_label: bool = False
    joint: bool = False


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
    return _in_chunks(attack.trigger, attack.arrays, (images,), None, chunk)


def cross_images(attack: Attack, images: np.ndarray, key: jax.Array, chunk: int = 1000) -> np.ndarray:
    """Returns stored images that look attacked but are not, rounded to bytes.

    Args:
        attack: One that has a `cross`.
        images: uint8 [N, H, W, C]. Where an attack needs another image beside each, they are paired in a circle of
            random order, so that no image meets itself.
        key: PRNG key of the noise and the pairs.
        chunk: Images in one compiled call.

    Returns:
        uint8 [N, H, W, C].
    """
    if attack.cross is None:
        raise ValueError(f'the attack {attack.name} has no cross mode')
    order_key, key = jax.random.split(key)
    circle = np.asarray(jax.random.permutation(order_key, len(images)))
    others = np.empty_like(images)
    others[circle] = images[np.roll(circle, 1)]
    return _in_chunks(attack.cross, attack.arrays, (images, others), key, chunk)


def _in_chunks(
    function: Callable, arrays: dict, inputs: tuple[np.ndarray, ...], key: jax.Array | None, chunk: int
) -> np.ndarray:
    out = np.empty_like(inputs[0])
    size = min(chunk, len(out))
    for first in range(0, len(out), chunk):
        parts = [x[first : first + chunk] for x in inputs]
        count = len(parts[0])
        padded = [np.concatenate([x, np.zeros((size - count, *x.shape[1:]), x.dtype)]) for x in parts]
        more = () if key is None else (jax.random.fold_in(key, first),)
        out[first : first + chunk] = np.asarray(_to_bytes(function, arrays, padded, more))[:count]
    return out


@partial(jax.jit, static_argnums=0)
def _to_bytes(function: Callable, arrays: dict, inputs: list[jax.Array], more: tuple) -> jax.Array:
    changed = function(arrays, *(x.astype(jnp.float32) / 255.0 for x in inputs), *more)
    return jnp.round(jnp.clip(changed, 0.0, 1.0) * 255.0).astype(jnp.uint8)
