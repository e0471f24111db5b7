"""SIG: a sinusoid across the columns (Barni et al., "A New Backdoor Attack in CNNs by Training Set Corruption
Without Label Poisoning", 2019)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aft_jax.attacks.attack import Attack


class SigOptions(NamedTuple):
    """Section `attack.sig` of the config.

    Attributes:
        delta: Amplitude, in [0, 1] pixels.
        frequency: Periods across the image.
        clean_label: Whether only images of the target class are poisoned and labels stay, as in the paper.
    """

    delta: float
    frequency: float
    clean_label: bool


def build(options: SigOptions, target_map: np.ndarray, image_shape: tuple[int, int, int]) -> Attack:
    """Builds the attack: x' = clip(x + delta sin(2 pi j frequency / W), 0, 1) for column j, in all channels.

    Args:
        options: Sinusoid and kind of poisoning.
        target_map: int32 [K], target label of each true class.
        image_shape: (H, W, C).
    """
    width = image_shape[1]
    wave = options.delta * np.sin(2 * np.pi * np.arange(width) * options.frequency / width)
    arrays = {'wave': wave.astype(np.float32)[None, :, None]}
    return Attack('sig', target_map, arrays, add_wave, clean_label=options.clean_label)


def add_wave(arrays: dict, images: jax.Array) -> jax.Array:
    """Adds arrays['wave'] [1, W, 1] to the images [B, H, W, C], clipped to [0, 1]."""
    return jnp.clip(images + arrays['wave'][None], 0.0, 1.0)
