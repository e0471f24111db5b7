"""The type of all attacks: a trigger and the target labels of triggered images."""

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
        name: Name such as 'badnets'.
        target_map: int32 [K], target label of each true class.
        arrays: Arrays that define the trigger, by name, perhaps nested. The poison manifest keeps them.
        trigger: Pure function (arrays, images) -> images, float32 [B, H, W, C] in [0, 1]. It treats each image alone.
        cross_mode: Function (arrays, images, others, key) -> images that look attacked but keep their true label.
            WaNet draws noise from the key. The input-aware attack pastes the triggers of `others` [B, H, W, C]. None
            for attacks without such images.
        clean_label: Whether only images of the target class are poisoned and labels stay.
        trigger_is_trained: Whether trigger and classifier are trained together, batch by batch. Then `arrays` are
            final only after the training, and no stored image is poisoned.
    """

    name: str
    target_map: np.ndarray
    arrays: dict[str, Any]
    trigger: Callable[[dict, jax.Array], jax.Array]
    cross_mode: Callable[[dict, jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    clean_label: bool = False
    trigger_is_trained: bool = False

    @property
    def target_class(self) -> int:
        """The one target label of an all2one attack.

        Raises:
            ValueError: The attack has several target labels.
        """
        labels = np.unique(self.target_map)
        if len(labels) != 1:
            raise ValueError(f'the attack {self.name} has several target labels: {labels.tolist()}')
        return int(labels[0])


def target_map(label_mode: str, target: int, num_classes: int) -> np.ndarray:
    """Builds int32 [K]: `target` everywhere (all2one), or y -> (y + 1) mod K (all2all)."""
    if label_mode == 'all2one':
        return np.full(num_classes, target, np.int32)
    return ((np.arange(num_classes) + 1) % num_classes).astype(np.int32)


def triggered(attack: Attack, images: np.ndarray, chunk: int = 1000) -> np.ndarray:
    """Puts the trigger on stored images, rounded to bytes as an attacker would store them.

    Args:
        attack: Attack.
        images: uint8 [N, H, W, C].
        chunk: Images in one compiled call.

    Returns:
        uint8 [N, H, W, C].
    """
    return _in_chunks(attack.trigger, attack.arrays, (images,), None, chunk)


def cross_images(attack: Attack, images: np.ndarray, key: jax.Array, chunk: int = 1000) -> np.ndarray:
    """Converts stored images to cross mode, rounded to bytes: they look attacked but keep their true label.

    An attack may need another image beside each one. All images are paired in a circle of random order, so that no
    image is paired with itself.

    Args:
        attack: Attack that has a `cross_mode`.
        images: uint8 [N, H, W, C].
        key: PRNG key of the noise and the pairs.
        chunk: Images in one compiled call.

    Returns:
        uint8 [N, H, W, C].
    """
    if attack.cross_mode is None:
        raise ValueError(f'the attack {attack.name} has no cross mode')
    order_key, key = jax.random.split(key)
    circle = np.asarray(jax.random.permutation(order_key, len(images)))
    others = np.empty_like(images)
    others[circle] = images[np.roll(circle, 1)]
    return _in_chunks(attack.cross_mode, attack.arrays, (images, others), key, chunk)


def _in_chunks(
    function: Callable, arrays: dict, inputs: tuple[np.ndarray, ...], key: jax.Array | None, chunk: int
) -> np.ndarray:
    """Applies a trigger or a cross mode in chunks of one size. Zeros fill up the last chunk."""
    outputs = np.empty_like(inputs[0])
    size = min(chunk, len(outputs))
    for first in range(0, len(outputs), chunk):
        rows = [x[first : first + chunk] for x in inputs]
        count = len(rows[0])
        padded = [np.concatenate([x, np.zeros((size - count, *x.shape[1:]), x.dtype)]) for x in rows]
        keys = () if key is None else (jax.random.fold_in(key, first),)
        outputs[first : first + chunk] = np.asarray(_to_bytes(function, arrays, padded, keys))[:count]
    return outputs


@partial(jax.jit, static_argnums=0)
def _to_bytes(function: Callable, arrays: dict, inputs: list[jax.Array], keys: tuple) -> jax.Array:
    outputs = function(arrays, *(x.astype(jnp.float32) / 255.0 for x in inputs), *keys)
    return jnp.round(jnp.clip(outputs, 0.0, 1.0) * 255.0).astype(jnp.uint8)
