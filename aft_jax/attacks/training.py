"""How a classifier is trained under an attack: what the one training loop needs for the stage 'infect'.

An attacker who controls the data alone leaves the training as it is. One who controls the training may change the
step and train a trigger along with the classifier, so the attack is complete only when the stage has ended: it is
read from the state, by `attack_of`, for every kind of attack.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import optax

from aft_jax.attacks.attack import Attack
from aft_jax.attacks.poison import poison_batch
from aft_jax.config import as_options
from aft_jax.data.augment import AugmentOptions, augment
from aft_jax.training.state import Step, TrainState
from aft_jax.training.steps import classification_step


class Learner(NamedTuple):
    """The classifier that is about to be trained.

    Attributes:
        module: Its architecture.
        optimiser: Its optimiser.
        state: Before the first step.
    """

    module: nn.Module
    optimiser: optax.GradientTransformation
    state: TrainState


class Infection(NamedTuple):
    """The training of the stage 'infect'.

    Attributes:
        state: Before the first step; a pytree with `step` and, as `variables`, the classifier's.
        step: (state, batch, key) -> (state, metrics).
        attack_of: state -> the attack as it stands in that state, or None without one.
        num_streams: Independently shuffled batches that a step sees.
        constants: What every step finds in batch['constants'].
        seconds: Spent before the first step.
    """

    state: Any
    step: Step
    attack_of: Callable[[Any], Attack | None]
    num_streams: int = 1
    constants: Any = None
    seconds: float = 0.0


def plain(attack: Attack | None, learner: Learner, config: ml_collections.ConfigDict) -> Infection:
    """Returns ordinary training, on a poisoned training set or with poisoned batches.

    Args:
        attack: A finished attack, or None.
        learner: The classifier.
        config: The resolved config.
    """

    def transform(key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        augment_key, cross_key = jax.random.split(key)
        images = augment(augment_key, images, as_options(AugmentOptions, config.augment))
        if attack is not None and config.attack.poisoning == 'per_batch':
            images, labels = poison_batch(attack, cross_key, images, labels, config)
        return images, labels

    step = partial(classification_step, module=learner.module, optimiser=learner.optimiser, transform=transform)
    return Infection(learner.state, step, lambda _: attack)
