"""SIG: a sinusoid across the columns (Barni et al., "A New Backdoor Attack in CNNs by Training Set Corruption
Without Label Poisoning", 2019)."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from aft_jax.attacks.attack import Attack


def build(options: ml_collections.ConfigDict, target_map: np.ndarray, image_shape: tuple[int, int, int]) -> Attack:
    """Returns the attack: x' = clip(x + delta sin(2 pi j frequency / W), 0, 1) for column j, in all channels.

    Args:
        options: `config.attack.sig`: delta (in [0, 1] pixels), frequency (periods across the image), clean_label
            (the paper's own variant: poison images of the target class alone and leave their labels).
        target_map: int32 [K].
        image_shape: (H, W, C).
    """
    width = image_shape[1]
    wave = options.delta * np.sin(2 * np.pi * np.arange(width) * options.frequency / width)
    arrays = {'wave': wave.astype(np.float32)[None, :, None]}
    return Attack('sig', target_map, arrays, add_wave, clean_label=options.clean_label)


def add_wave(arrays: dict, images: jax.Array) -> jax.Array:
    """Returns the images [B, H, W, C] plus arrays['wave'] [1, W, 1], within [0, 1]."""
    return jnp.clip(images + arrays['wave'][None], 0.0, 1.0)
