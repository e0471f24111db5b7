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

from aft_jax.data.augment import augment
from aft_jax.defenses.aft_options import AftOptions
from aft_jax.defenses.defender import DefenderData, DefenseSettings, start_training
from aft_jax.defenses.fst import draw_head, fst_step
from aft_jax.models.head import find_head, layer_at
from aft_jax.randomness import key_for
from aft_jax.training import averaging
from aft_jax.training.loop import fit
from aft_jax.training.stage import Fitted, Phase, Run, TrainingStage
from aft_jax.training.steps import classification_step


def fit_reference(run: Run, name: str, data: DefenderData, settings: DefenseSettings) -> Fitted:
    """Trains the reference model; its averaged variables are `fitted.state.variables`.

    Args:
        run: Experiment.
        name: Name of checkpoints and metrics.
        data: Infected model and clean images.
        settings: Settings with `AftOptions`.
    """
    options: AftOptions = settings.options
    head = find_head(data.module, data.images.shape[1:])
    infected_kernel = None
    if head is not None:
        params = data.variables['params']
        infected_kernel = layer_at(params, head)['kernel']
        params = draw_head(key_for(run.seed, f'{name}/head'), params, head)
        data = data._replace(variables=data.variables | {'params': params})
    steps = options.reference_steps
    start, sgd = start_training(data, settings, steps, options.reference_learning_rate, schedule='one_cycle')
    common = {'module': data.module, 'optimiser': sgd}
    if head is not None:
        step = partial(fst_step, head=head, alpha=options.reference_penalty, augmentation=settings.augment, **common)
    else:
        transform = lambda key, images, labels: (augment(key, images, settings.augment), labels)  # noqa: E731
        step = partial(classification_step, transform=transform, **common)
    stage = TrainingStage(
        name,
        averaging.init(start),
        [Phase(averaging.averaged(step, options.averaging), steps)],
        data.arrays,
        settings.batch_size,
        constants=infected_kernel,
    )
    return fit(run, stage)
