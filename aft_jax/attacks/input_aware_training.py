"""The two training stages of the input-aware attack: the mask network, then classifier and generator together."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import optax

from aft_jax.attacks.attack import Attack
from aft_jax.attacks.input_aware import Networks
from aft_jax.attacks.input_aware_networks import networks_for
from aft_jax.attacks.input_aware_steps import JointState, joint_step, mask_step
from aft_jax.attacks.training import AttackSettings, AttackTraining
from aft_jax.training import optimiser as optimisers
from aft_jax.training import state
from aft_jax.training.loop import fit
from aft_jax.training.stage import Phase, Run, TrainingStage
from aft_jax.training.state import TrainState


def train_mask_network(
    run: Run, attack: Attack, arrays: dict[str, np.ndarray], settings: AttackSettings
) -> tuple[Attack, float]:
    """Trains the mask network alone: stage 1, 'infect_mask'.

    Args:
        run: Experiment.
        attack: Attack before any training.
        arrays: Clean training set: 'images' uint8 [N, H, W, C] and 'labels' int32 [N].
        settings: Settings of the training.

    Returns:
        The attack with the trained mask network, and the seconds of the training.
    """
    options = settings.input_aware
    steps = settings.steps(options.mask_epochs)
    optimiser = adam(scheduled(options.mask_learning_rate, steps, settings.train.schedule))
    networks = Networks(*networks_for(settings.image_shape))
    step = partial(mask_step, networks=networks, optimiser=optimiser, settings=settings)
    stage = TrainingStage(
        name='infect_mask',
        state=state.create(attack.arrays['mask'], optimiser),
        phases=[Phase(step, steps)],
        arrays=arrays,
        batch_size=settings.batch_size,
        num_streams=2,
        trains_model=False,
    )
    fitted = fit(run, stage)
    variables = jax.device_get(fitted.state.variables)
    return attack._replace(arrays=attack.arrays | {'mask': variables}), fitted.seconds


def joint_training(
    attack: Attack,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    classifier: TrainState,
    settings: AttackSettings,
) -> AttackTraining:
    """Prepares the training of classifier and generator: stage 2, 'infect'.

    Args:
        attack: Attack with a trained mask network.
        module: Classifier.
        optimiser: Optimiser of the classifier.
        classifier: State of the classifier before the first step.
        settings: Settings of the training.
    """
    rate = settings.input_aware.generator_learning_rate
    generator_optimiser = adam(scheduled(rate, settings.steps(settings.train.epochs), settings.train.schedule))
    step = partial(
        joint_step,
        networks=Networks(*networks_for(settings.image_shape)),
        module=module,
        optimisers=(optimiser, generator_optimiser),
        target_map=attack.target_map,
        settings=settings,
    )

    def attack_of(current: JointState) -> Attack:
        return attack._replace(arrays=attack.arrays | {'generator': jax.device_get(current.generator.variables)})

    before = JointState(classifier, state.create(attack.arrays['generator'], generator_optimiser))
    return AttackTraining(before, step, attack_of, num_streams=2, constants=attack.arrays['mask'])


def scheduled(rate: float, steps: int, schedule: str) -> optax.ScalarOrSchedule:
    """Builds the learning rate of a network of the attack, with the schedule of the classifier.

    The decay matters to the mask network. Masks are later made with its running statistics, which fit only a network
    that no longer changes. With a constant rate, masks in evaluation had between a third and all of their area in
    training, depending on the run, and some images had no mask.
    """
    return optax.cosine_decay_schedule(rate, steps) if schedule == 'cosine' else rate


def adam(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Builds the optimiser of both networks, with the authors' betas (0.5, 0.9)."""
    return optimisers.adam(rate, b1=0.5, b2=0.9)
