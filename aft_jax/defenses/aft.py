"""AFT: adversarial fine-tuning ("Adversarial Fine-tuning for Backdoor Defense", arXiv 2202.06312), with a reference.

Adversarial examples of an infected model behave like its triggered images, so fine-tuning on them breaks the backdoor.
Most adversarial examples have nothing to do with the backdoor, however. They show weaknesses that every network of this
kind has, and a small network that unlearns those loses clean accuracy. A reference model (`defenses.reference`) tells
them apart: AFT trains on examples that fool the current model and not the reference, with the predictions of the
reference as their labels. Two stages:

    reference     FST of the infected model, with averaged weights
    adversarial   from the infected model: clean images, mixtures of clean images, and adversarial examples of several
                  kinds whose sizes are drawn at random in each step (`defenses.aft_step` has the loss)

Nobody knows what a trigger looks like. The perturbations are therefore of many kinds: patterns over the whole image,
smooth ones, rectangles and regions at any place, distortions. Universal ones are shared by several images of the batch,
as they would share a trigger. Per-image ones are for sample-specific triggers.

Distillation from the infected model preserves what it learned from many more images than the defender has, but it also
preserves the backdoor. CutMix images carry a local trigger over, since a pasted rectangle looks like one. Their targets
are therefore what infected and reference model agree on.

The images are shifted at random, even if the infected model was trained without that. Shifted images retain more
accuracy, and a trigger no longer lies at the place that the features were trained for: under FST and under fine-tuning,
shifts by two pixels lower what is left of some backdoors from 37 to 1 %.

The result is the average of the weights, with BatchNorm statistics measured on the clean images.

Lengths are in steps, not in epochs: a few hundred images need as many steps as a few thousand.

Needs: the infected model and clean images. Costs: for each adversarial example `pgd_steps` + 1 input gradients of two
models, and three predictions.
"""

import time
from functools import partial

from aft_jax.defenses.aft_options import AftOptions
from aft_jax.defenses.aft_step import aft_step, init_state
from aft_jax.defenses.batch_norm_statistics import Statistics
from aft_jax.defenses.defender import DefenderData, DefenseSettings, Purified, start_training
from aft_jax.defenses.reference import fit_reference
from aft_jax.training import averaging
from aft_jax.training.loop import fit
from aft_jax.training.stage import Phase, Run, TrainingStage

__all__ = ['AftOptions', 'purify']


def purify(run: Run, name: str, data: DefenderData, settings: DefenseSettings) -> Purified:
    """Fine-tunes the infected model adversarially.

    Args:
        run: Experiment.
        name: Name of checkpoints and metrics. The reference model has a name of its own below it.
        data: Infected model, and images with labels.
        settings: Settings with `AftOptions`.
    """
    options: AftOptions = settings.options
    settings = with_shift(settings, data.images.shape[1:])
    reference = fit_reference(run, f'{name}/reference', data, settings)
    start, optimiser = start_training(data, settings, options.steps, options.learning_rate, schedule='one_cycle')
    step = partial(aft_step, module=data.module, optimiser=optimiser, options=options, augmentation=settings.augment)
    constants = {'infected': data.variables, 'reference': reference.state.variables}
    stage = TrainingStage(
        f'{name}/adversarial',
        init_state(averaging.init(start), options, data.images.shape[1:]),
        [Phase(step, options.steps)],
        data.arrays,
        settings.batch_size,
        constants=constants,
    )
    fitted = fit(run, stage)
    started = time.monotonic()
    statistics = Statistics(data.module, run.mesh, settings.batch_size)
    variables = statistics(fitted.state.variables, data.images)
    return Purified(variables, reference.seconds + fitted.seconds + time.monotonic() - started)


def with_shift(settings: DefenseSettings, image_shape: tuple[int, ...]) -> DefenseSettings:
    """Raises the shift of the augmentation to that of the options; a larger shift stays as it is.

    Args:
        settings: Settings with `AftOptions`.
        image_shape: (H, W, C).
    """
    crop = round(settings.options.shift * min(image_shape[:2]))
    return settings._replace(augment=settings.augment._replace(crop=max(settings.augment.crop, crop)))
