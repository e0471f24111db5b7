"""The reference model: the infected model after hard fine-tuning, which tells a backdoor from natural weaknesses.

Fine-tuning with a high learning rate removes most of a backdoor, and costs clean accuracy. The result is a poor
purified model, but it answers a question: which adversarial examples fool the infected model alone? Those that fool
both models show weaknesses that every network of this kind has. The others show its backdoor.

The reference is the average of the weights over the last steps, which costs less accuracy than the last step.

Source: comparing a model with a changed copy of itself is also the idea of BTI-DBF (Xu et al., ICLR 2024), BAN (Xu et
al., NeurIPS 2024) and TSBD (Lin et al., ECCV 2024). None of them uses the copy to choose adversarial examples.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import optax

from aft_jax.data.augment import AugmentOptions, augment
from aft_jax.defenses.defender import DefenderData, DefenseSettings
from aft_jax.training import averaging, optimiser, state
from aft_jax.training.averaging import AveragedState
from aft_jax.training.loop import fit
from aft_jax.training.stage import Fitted, Phase, Run, TrainingStage
from aft_jax.training.state import Batch, Metrics
from aft_jax.training.steps import classification_step


class ReferenceOptions(NamedTuple):
    """Fields of the section `aft` about the reference model.

    Attributes:
        reference_steps: Length of the fine-tuning in steps.
        reference_learning_rate: Largest learning rate.
        averaging: Share of the averaged weights that a step keeps.
        max_grad_norm: Largest norm of a gradient. 0 for no limit.
    """

    reference_steps: int
    reference_learning_rate: float
    averaging: float
    max_grad_norm: float


def fit_reference(
    run: Run, name: str, data: DefenderData, settings: DefenseSettings, options: ReferenceOptions
) -> Fitted:
    """Fine-tunes the infected model with a high learning rate; the averaged model is `fitted.state.variables`.

    Args:
        run: Experiment.
        name: Name of checkpoints and metrics.
        data: Infected model and clean images.
        settings: Settings of the defense.
        options: Options of the reference model.
    """
    start, sgd = start_averaged(
        data, settings, options.reference_steps, options.reference_learning_rate, options.max_grad_norm
    )
    step = partial(
        reference_step,
        module=data.module,
        optimiser=sgd,
        augmentation=settings.augment,
        decay=options.averaging,
    )
    stage = TrainingStage(name, start, [Phase(step, options.reference_steps)], data.arrays, settings.batch_size)
    return fit(run, stage)


def start_averaged(
    data: DefenderData, settings: DefenseSettings, steps: int, learning_rate: float, max_grad_norm: float
) -> tuple[AveragedState, optax.GradientTransformation]:
    """Creates the infected model's state before the first step, with its average, and SGD with one learning rate cycle.

    Args:
        data: Data with the infected model.
        settings: Settings, of which momentum and weight decay are used.
        steps: Length of the training.
        learning_rate: Largest learning rate of the cycle.
        max_grad_norm: Largest norm of a gradient. 0 for no limit.
    """
    sgd = optimiser.sgd(
        learning_rate,
        'one_cycle',
        steps,
        momentum=settings.train.momentum,
        weight_decay=settings.train.weight_decay,
        max_grad_norm=max_grad_norm,
    )
    return averaging.init(state.create(data.variables, sgd)), sgd


def reference_step(
    state: AveragedState,
    batch: Batch,
    key: jax.Array,
    *,
    module: nn.Module,
    optimiser: optax.GradientTransformation,
    augmentation: AugmentOptions,
    decay: float,
) -> tuple[AveragedState, Metrics]:
    """Takes a step down the cross-entropy of augmented clean images, and updates the average.

    Args:
        state: State before the step.
        batch: 'images' float32 [B, H, W, C] in [0, 1] and 'labels' int32 [B].
        key: PRNG key of this step.
        module: Classifier.
        optimiser: Optimiser of the classifier.
        augmentation: Options of `augment`.
        decay: Share of the averaged weights that the step keeps.

    Returns:
        The state after the step, and the metrics of `classification_step`.
    """
    classifier, metrics = classification_step(
        state.classifier,
        batch,
        key,
        module=module,
        optimiser=optimiser,
        transform=lambda key, images, labels: (augment(key, images, augmentation), labels),
    )
    return averaging.follow(state, classifier, decay), metrics
