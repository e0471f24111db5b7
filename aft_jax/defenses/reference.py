"""The reference model: the infected model after FST, which tells a backdoor from natural weaknesses.

FST (`aft_jax.defenses.fst`) trains the whole network with a new head that is unlike the infected one. Nearly nothing of
a backdoor is left in the predictions, at four points of clean accuracy. The result is a poor purified model, and its
features still hold the backdoor. But it answers a question: which adversarial examples fool the infected model alone?
Those that fool both models show weaknesses that every network of this kind has. The others show its backdoor.

The reference is the average of the weights over the last steps, which costs less accuracy than the last step. A network
that does not end with a dense layer has no head to draw again. Its reference is fine-tuned with the same learning rate,
which leaves more of the backdoor.

Source: comparing a model with a changed copy of itself is also the idea of BTI-DBF (Xu et al., ICLR 2024), BAN (Xu et
al., NeurIPS 2024) and TSBD (Lin et al., ECCV 2024).
"""

from functools import partial
from typing import NamedTuple

import optax

from aft_jax.data.augment import augment
from aft_jax.defenses.defender import DefenderData, DefenseSettings
from aft_jax.defenses.fst import draw_head, fst_step
from aft_jax.models.head import find_head, layer_at
from aft_jax.randomness import key_for
from aft_jax.training import averaging, optimiser, state
from aft_jax.training.averaging import AveragedState, averaged
from aft_jax.training.loop import fit
from aft_jax.training.stage import Fitted, Phase, Run, TrainingStage
from aft_jax.training.steps import classification_step


class ReferenceOptions(NamedTuple):
    """Fields of the section `aft` about the reference model.

    Attributes:
        reference_steps: Length of the fine-tuning in steps.
        reference_learning_rate: Largest learning rate.
        reference_penalty: Weight of the penalty that keeps the head unlike the infected one.
        averaging: Share of the averaged weights that a step keeps.
        max_grad_norm: Largest norm of a gradient. 0 for no limit.
    """

    reference_steps: int
    reference_learning_rate: float
    reference_penalty: float
    averaging: float
    max_grad_norm: float


def fit_reference(
    run: Run, name: str, data: DefenderData, settings: DefenseSettings, options: ReferenceOptions
) -> Fitted:
    """Trains the reference model; its averaged variables are `fitted.state.variables`.

    Args:
        run: Experiment.
        name: Name of checkpoints and metrics.
        data: Infected model and clean images.
        settings: Settings of the defense.
        options: Options of the reference model.
    """
    head = find_head(data.module, data.images.shape[1:])
    infected_kernel = None
    if head is not None:
        params = data.variables['params']
        infected_kernel = layer_at(params, head)['kernel']
        params = draw_head(key_for(run.seed, f'{name}/head'), params, head)
        data = data._replace(variables=data.variables | {'params': params})
    start, sgd = start_averaged(
        data, settings, options.reference_steps, options.reference_learning_rate, options.max_grad_norm
    )
    common = {'module': data.module, 'optimiser': sgd}
    if head is not None:
        step = partial(fst_step, head=head, alpha=options.reference_penalty, augmentation=settings.augment, **common)
    else:
        transform = lambda key, images, labels: (augment(key, images, settings.augment), labels)  # noqa: E731
        step = partial(classification_step, transform=transform, **common)
    stage = TrainingStage(
        name,
        start,
        [Phase(averaged(step, options.averaging), options.reference_steps)],
        data.arrays,
        settings.batch_size,
        constants=infected_kernel,
    )
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
