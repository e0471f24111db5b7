"""What the two sides of an experiment are about."""

from typing import NamedTuple

import flax.linen as nn
import numpy as np

from aft_jax.attacks.attack import Attack
from aft_jax.attacks.poison import Poisoned
from aft_jax.data.dataset import Dataset


class Scenario(NamedTuple):
    """Everything that the two sides of an experiment are about.

    Attributes:
        dataset: The data, clean.
        attack: The attack before the infection, or None.
        poisoned: The training set as the attacker left it.
        clean: int32, the training images that the defender is given.
        module: The classifier.
    """

    dataset: Dataset
    attack: Attack | None
    poisoned: Poisoned
    clean: np.ndarray
    module: nn.Module


class InfectedModel(NamedTuple):
    """What the infection leaves.

    Attributes:
        variables: The classifier's.
        attack: The attack as it is carried out from now on, or None.
        seconds: What the training took.
    """

    variables: dict
    attack: Attack | None
    seconds: float
