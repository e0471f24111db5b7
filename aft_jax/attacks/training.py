"""The training of a classifier under an attack: what the one training loop needs for the stage 'infect'.

An attacker who controls the data alone leaves the training as it is. One who controls the training may change the step
and train a trigger along with the classifier. Such an attack is complete only when the stage has ended, so every kind
of attack is read from the state, by `attack_of`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import optax

from aft_jax.attacks.attack import Attack
from aft_jax.attacks.input_aware import InputAwareOptions
from aft_jax.attacks.poison import PoisoningOptions, poison_batch, poisoning_options
from aft_jax.config import as_options
from aft_jax.data.augment import AugmentOptions, augment
from aft_jax.data.order import count_steps
from aft_jax.training.optimiser import TrainOptions
from aft_jax.training.state import Step, TrainState
from aft_jax.training.steps import classification_step


class AttackSettings(NamedTuple):
    """Everything that an attack's training takes from the config and the training set.

    Attributes:
        num_images: N of the training set.
        image_shape: (H, W, C).
        batch_size: Images in a step.
        train: Section `train`.
        augment: Section `augment`.
        poisoning: Share and kind of the poisoning.
        input_aware: Section `attack.input_aware`.
        pixel_std: Standard deviation by which the classifier normalises pixels, one value or one for each channel.
    """

    num_images: int
    image_shape: tuple[int, int, int]
    batch_size: int
    train: TrainOptions
    augment: AugmentOptions
    poisoning: PoisoningOptions
    input_aware: InputAwareOptions
    pixel_std: tuple[float, ...]

    def steps(self, epochs: float) -> int:
        """Computes the steps of a number of epochs."""
        return count_steps(self.num_images, epochs, self.batch_size)


class AttackTraining(NamedTuple):
    """Training of the stage 'infect', as the training loop takes it.

    Attributes:
        state: Pytree before the first step, with `step` and the classifier's `variables`.
        step: Function (state, batch, key) -> (state, metrics).
        attack_of: Function state -> attack as it is in that state, or None without an attack.
        num_streams: Independently shuffled batches that a step sees.
        constants: Pytree that every step finds in batch['constants'].
    """

    state: Any
    step: Step
    attack_of: Callable[[Any], Attack | None]
    num_streams: int = 1
    constants: Any = None


def attack_settings(config: ml_collections.ConfigDict, shape: tuple[int, int, int, int]) -> AttackSettings:
    """Reads the settings of an attack's training from a resolved config.

    Args:
        config: Resolved config.
        shape: Shape (N, H, W, C) of the training images.
    """
    num_images, height, width, channels = shape
    return AttackSettings(
        num_images,
        (height, width, channels),
        config.batch_size,
        as_options(TrainOptions, config.train),
        as_options(AugmentOptions, config.augment),
        poisoning_options(config),
        as_options(InputAwareOptions, config.attack.input_aware),
        tuple(config.model.std),
    )


def standard_training(
    attack: Attack | None,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    state: TrainState,
    settings: AttackSettings,
) -> AttackTraining:
    """Prepares ordinary training, on a poisoned training set or with poisoned batches.

    Args:
        attack: Attack whose trigger is final, or None.
        module: Classifier.
        optimiser: Optimiser of the classifier.
        state: State before the first step.
        settings: Settings of the training.
    """

    def transform(key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        augment_key, cross_key = jax.random.split(key)
        images = augment(augment_key, images, settings.augment)
        if attack is not None and settings.poisoning.poisoning == 'per_batch':
            images, labels = poison_batch(attack, cross_key, images, labels, settings.poisoning)
        return images, labels

    step = partial(classification_step, module=module, optimiser=optimiser, transform=transform)
    return AttackTraining(state, step, lambda _: attack)
