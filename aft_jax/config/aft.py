"""The options of adversarial fine-tuning (AFT): with a reference model, and without one in several presets.

An option stands in one row here, and where the defense uses it.
"""

from typing import Any

from aft_jax.adversarial.perturbations import SIZE_RANGES
from aft_jax.adversarial.pgd import NORMS
from aft_jax.config.fields import (
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_SHARE,
    SHARE_OR_ZERO,
    Check,
    Field,
    names_of,
    one_of,
)


def _option(doc: str, released: Any, default: Any, small: Any = None, check: Check | None = None) -> Field:
    """Builds an option that is empty until its preset fills it. `small` is the default's value if it is None."""
    presets = {'released': released, 'default': default, 'small': default if small is None else small}
    return Field(type(default), doc, check, presets)


AFT_SECTION: dict[str, Field] = {
    'reference_steps': Field(700, 'Steps of the training of the reference model.', POSITIVE),
    'reference_learning_rate': Field(0.1, 'Largest learning rate of the reference model.', POSITIVE),
    'reference_penalty': Field(
        0.03, 'Weight of the penalty that keeps the head of the reference unlike the infected one.', NOT_NEGATIVE
    ),
    'steps': Field(470, 'Steps of the adversarial fine-tuning.', POSITIVE),
    'learning_rate': Field(0.03, 'Largest learning rate of the adversarial fine-tuning.', POSITIVE),
    'shift': Field(
        0.07,
        "Largest shift of augmented images, a share of the image's side. A larger one of `augment.crop` has priority.",
        BELOW_ONE,
    ),
    'universal': Field(
        'rectangle,region,linf,l2,low_frequency,tone,blur,warp,affine',
        'Kinds of universal perturbations.',
        names_of(*SIZE_RANGES),
    ),
    'per_image': Field('rectangle,linf', 'Kinds of per-image perturbations.', names_of(*SIZE_RANGES)),
    'renew_every': Field(20, 'Steps after which a universal perturbation starts again.', POSITIVE),
    'pgd_steps': Field(4, 'Steps of each adversarial attack.', POSITIVE),
    'adversarial_share': Field(1.0, 'Adversarial examples in a step, a share of its clean images.', POSITIVE_SHARE),
    'adversarial_weight': Field(
        0.5, "Weight of the divergence from the reference model's predictions on adversarial examples.", NOT_NEGATIVE
    ),
    'cross_entropy': Field(0.2, 'Weight of the cross-entropy of clean images.', NOT_NEGATIVE),
    'distillation': Field(
        0.8, "Weight of the divergence from the infected model's predictions on clean images.", NOT_NEGATIVE
    ),
    'temperature': Field(2.0, 'Temperature of that divergence.', POSITIVE),
    'mixture_weight': Field(
        3.0,
        'Weight of the divergence, on CutMix images, from what infected and reference model agree on.',
        NOT_NEGATIVE,
    ),
    'averaging': Field(0.98, 'Share of the averaged weights that a step keeps.', BELOW_ONE),
    'max_grad_norm': Field(1.0, 'Largest norm of a gradient; 0 for no bound.', NOT_NEGATIVE),
}

# Kinds of perturbations of AFT without a reference model.
UNIVERSAL_KINDS = ('linf', 'l2', 'sparse', 'warp')

# The presets of AFT without a reference model:
#   released  the authors' released code: 3 of 20 epochs on adversarial examples, the rest on clean images
#   default   ours: universal and per-image perturbations, and distillation on clean images with CutMix
#   small     ours, for a clean set of a few hundred images, where an epoch has one or two steps
UNIVERSAL_OPTIONS: dict[str, Field] = {
    'norm': _option('Norm of the PGD perturbation.', 'linf', 'linf', check=one_of(*NORMS)),
    'eps': _option('Size of PGD and linf perturbations, for pixels in [0, 1].', 6 / 255, 20 / 255, check=POSITIVE),
    'step_size': _option('Size of a PGD step, for pixels in [0, 1].', 6 / 255 / 5, 5 / 255, check=POSITIVE),
    'universal': _option(
        'Kinds of universal perturbations, in place of PGD.',
        '',
        'linf,l2,sparse,warp',
        check=names_of(*UNIVERSAL_KINDS),
    ),
    'per_image': _option(
        'Kinds of per-image perturbations, in place of PGD.', '', 'linf,l2,sparse', check=names_of(*UNIVERSAL_KINDS)
    ),
    'rms_eps': _option(
        'Size of l2 perturbations: root mean square over the pixels, in [0, 1].', 0.0, 0.11, check=NOT_NEGATIVE
    ),
    'sparse_share': _option(
        'Size of sparse perturbations: share of the pixels set to 0 or 1.', 0.0, 0.015, check=SHARE_OR_ZERO
    ),
    'warp_share': _option(
        "Size of warp perturbations: largest shift of a pixel, a share of the image's side.",
        0.0,
        0.036,
        check=SHARE_OR_ZERO,
    ),
    'renew_every': _option('Steps after which universal perturbations are initialised again.', 1, 100, check=POSITIVE),
    'pgd_steps': _option('Steps of each adversarial attack.', 7, 4, check=POSITIVE),
    'random_start': _option('Whether PGD starts at a random point of the ball.', False, True),
    'clip': _option('Whether adversarial examples are clipped to [0, 1].', False, True),
    'epochs': _option('Epochs in all.', 20, 40, 120, check=POSITIVE),
    'adversarial_epochs': _option(
        'First epochs, which train on adversarial examples too.', 3.0, 38.0, 114.0, check=POSITIVE
    ),
    'adversarial_share': _option(
        'Share of a batch that is replaced by adversarial examples.', 1.0, 0.4375, check=POSITIVE_SHARE
    ),
    'adversarial_weight': _option('Weight of the loss on adversarial examples.', 1.0, 1.5, check=NOT_NEGATIVE),
    'distillation': _option(
        "Weight of the distillation of the infected model's clean predictions.", 0.0, 16.0, check=NOT_NEGATIVE
    ),
    'cutmix': _option(
        'CutMix: largest share of a clean image that another one covers; 0 for none.', 0.0, 1.0, check=SHARE_OR_ZERO
    ),
    'recalibrate': _option('Whether BatchNorm statistics are measured on clean images at the end.', False, True),
    'learning_rate': _option('Learning rate.', 1e-3, 0.08, check=POSITIVE),
    'schedule': _option('Learning rate schedule.', 'constant', 'cosine'),
    'max_grad_norm': _option('Largest norm of a gradient; 0 for no bound.', 0.0, 1.0, check=NOT_NEGATIVE),
}
# A field of these sections that the config leaves empty takes the preset's value.
AFT_PRESETS: dict[str, dict[str, Any]] = {
    preset: {name: (option.presets or {})[preset] for name, option in UNIVERSAL_OPTIONS.items()}
    for preset in ('released', 'default', 'small')
}
# The sections with presets: AFT with universal perturbations, and the authors' own for comparison.
AFT_SECTIONS = ('aft_universal', 'aft_released')


def preset_section(preset: str) -> dict[str, Field]:
    """Builds the fields of a section of AFT without a reference model, empty but for the preset."""
    return {
        'preset': Field(preset, 'Source of the values of all empty fields.', one_of(*AFT_PRESETS)),
        **UNIVERSAL_OPTIONS,
    }


def filled_section(preset: str, **changed: Any) -> dict[str, Field]:
    """Builds the fields of a section with the preset's values as defaults.

    Args:
        preset: Name of the preset.
        changed: Defaults that differ from the preset's.
    """
    values = AFT_PRESETS[preset] | changed
    return {name: option._replace(default=values[name], presets=None) for name, option in UNIVERSAL_OPTIONS.items()}
