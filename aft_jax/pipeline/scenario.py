"""The scenario of an experiment, and the infected model that comes out of it."""

from typing import NamedTuple

import flax.linen as nn
import numpy as np

from aft_jax.attacks.attack import Attack
from aft_jax.attacks.poison import Poisoned
from aft_jax.data.dataset import Dataset


class Scenario(NamedTuple):
    """Everything that is fixed before any training: the attacker's side and the defender's.

    Attributes:
        dataset: Clean data.
        attack: Attack before the infection, or None.
        poisoned: Training set after poisoning.
        clean: int32, indices of the clean training images that the defender holds.
        module: Classifier.
    """

    dataset: Dataset
    attack: Attack | None
    poisoned: Poisoned
    clean: np.ndarray
    module: nn.Module


class InfectedModel(NamedTuple):
    """The infected model (or the benign one) and its attack.

    Attributes:
        variables: Variables of the classifier.
        attack: Attack with its final trigger, or None.
        seconds: Wall-clock seconds of the training.
    """

    variables: dict
    attack: Attack | None
    seconds: float
