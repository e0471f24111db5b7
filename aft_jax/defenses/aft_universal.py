"""AFT without a reference model: the authors' method, and our recipe for triggers of five known attacks.

`aft_jax.defenses.aft` is our recipe for unknown triggers. This one leaves most small local triggers in place
(docs/results). It is kept for comparison, and PBE trains with it.

Untargeted adversarial examples of an infected model behave like its triggered images. Fine-tuning on them with their
true labels therefore breaks the backdoor. Two phases:

    adversarial   a share of each batch is replaced by adversarial examples of the current model
    clean         clean images alone

On clean images the loss may also keep the model close to the infected model's predictions:

    loss = adversarial_weight * sum over adversarial images of CE / B + sum over clean images of CE / B
         + distillation * mean over clean images of KL(infected || model)

Adversarial examples come from PGD, as in the paper, or from several kinds of perturbations
(`aft_jax.adversarial.perturbations`), each on an equal part of the images. All images of a batch have the same
`universal` perturbation, as they would have the same trigger. It is carried from step to step, so that it follows the
model, and starts from a random one every `renew_every` steps. For the same attack success rate, universal perturbations
cost less clean accuracy than `per_image` ones, which change the model only around one image. Per-image perturbations
are still needed against sample-specific triggers such as the input-aware attack (docs/results).

With cutmix the clean images contain a rectangle of another image, so they have neither label nor CE. The infected
model's predictions on such mixtures say more about what it has learned than those on a few thousand images. (Mixtures
that add two images up, such as mixup, do not work: they are blurred, and on them the infected model's predictions pass
on WaNet's backdoor.)

At the end `recalibrate` measures the BatchNorm statistics on clean images, since those of the training come from
mixtures.

Source: "Adversarial Fine-tuning for Backdoor Defense", arXiv 2202.06312.

Needs: the infected model and clean images. Costs: `pgd_steps` further input gradients for each adversarial image.
"""

import time
from functools import partial

from aft_jax.data.order import count_steps
from aft_jax.defenses.aft_universal_options import UniversalAftOptions
from aft_jax.defenses.aft_universal_step import aft_step, init_state
from aft_jax.defenses.batch_norm_statistics import Statistics
from aft_jax.defenses.defender import DefenderData, DefenseSettings, Purified, start_training
from aft_jax.randomness import key_for
from aft_jax.training.loop import fit
from aft_jax.training.stage import Phase, Run, TrainingStage

__all__ = ['UniversalAftOptions', 'purify']


def purify(run: Run, name: str, data: DefenderData, settings: DefenseSettings) -> Purified:
    """Fine-tunes the infected model adversarially.

    Args:
        run: Experiment.
        name: Name of checkpoints and metrics.
        data: Infected model, and images with labels.
        settings: Settings with `UniversalAftOptions`.
    """
    options: UniversalAftOptions = settings.options
    size, image_shape = len(data.labels), data.images.shape[1:]
    steps = count_steps(size, options.epochs, settings.batch_size)
    adversarial_steps = min(steps, count_steps(size, options.adversarial_epochs, settings.batch_size))
    classifier, optimiser = start_training(data, settings, steps, options.learning_rate)
    step = partial(aft_step, module=data.module, optimiser=optimiser, augmentation=settings.augment)
    phases = [
        Phase(partial(step, options=options), adversarial_steps),
        Phase(partial(step, options=options._replace(adversarial_share=0.0)), steps),
    ]
    state = init_state(classifier, options, key_for(run.seed, name), image_shape)
    stage = TrainingStage(name, state, phases, data.arrays, settings.batch_size, constants=data.variables)
    fitted = fit(run, stage)
    if not options.recalibrate:
        return Purified(fitted.state.variables, fitted.seconds)
    started = time.monotonic()
    statistics = Statistics(data.module, run.mesh, settings.batch_size)
    variables = statistics(fitted.state.variables, data.images)
    return Purified(variables, fitted.seconds + time.monotonic() - started)
