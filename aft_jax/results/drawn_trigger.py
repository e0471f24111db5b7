"""The facts about a random trigger that results.json and tables show."""

from pathlib import Path
from typing import NamedTuple, Self

import ml_collections
import numpy as np

from aft_jax.attacks import random_trigger


class DrawnTrigger(NamedTuple):
    """A random trigger in words.

    Attributes:
        draw: Seed of the draw, `attack.random.seed` of the config.
        family: Key of `random_trigger.FAMILIES`.
        description: Kind, sizes and strengths; '' if the shape of the images is unknown.
    """

    draw: int
    family: str
    description: str

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, image_shape: tuple[int, int, int]) -> Self | None:
        """Draws the trigger of a config again and describes it. None for another attack.

        Args:
            config: Config of an experiment.
            image_shape: (H, W, C).
        """
        if config.attack.name != random_trigger.NAME:
            return None
        drawn = random_trigger.draw(config.attack.random.seed, image_shape)
        return cls(config.attack.random.seed, drawn.family, random_trigger.describe(drawn))

    @classmethod
    def of_manifest(cls, draw: int, path: Path) -> Self:
        """Draws the trigger of a run whose results.json is older than its field `trigger`.

        The arrays of the manifest give the shape of the images. Arrays without a shape belong to triggers whose
        description does not depend on it.

        Args:
            draw: Seed of the draw.
            path: Path of the run's poison.npz.
        """
        try:
            with np.load(path, allow_pickle=False) as manifest:
                arrays = {name: manifest[f'trigger_{name}'] for name in _SHAPED if f'trigger_{name}' in manifest}
        except (OSError, ValueError):
            return cls(draw, random_trigger.draw(draw, (28, 28, 1)).family, '')
        drawn = random_trigger.draw(draw, _image_shape(arrays))
        return cls(draw, drawn.family, random_trigger.describe(drawn))


_SHAPED = ('opacity', 'pattern', 'field', 'gain')


def _image_shape(arrays: dict[str, np.ndarray]) -> tuple[int, int, int]:
    """Finds the shape of the images from those arrays of a trigger that have it."""
    height, width, channels = 28, 28, 1
    for name in ('field', 'opacity', 'pattern'):
        if name in arrays:
            height, width = arrays[name].shape[-3:-1]
    for name in ('pattern', 'gain'):
        if name in arrays:
            channels = arrays[name].shape[-1]
    return height, width, channels
