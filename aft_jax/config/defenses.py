"""The fields of the defenses: a section each, with the name of the defense."""

from typing import Any

from aft_jax.config.aft import AFT_SECTION, filled_section, preset_section
from aft_jax.config.fields import (
    BELOW_ONE,
    IN_PIXELS,
    NOT_NEGATIVE,
    OPEN_SHARE,
    POSITIVE,
    POSITIVE_SHARE,
    RISING_POSITIVE,
    SHARE_OR_ZERO,
    Check,
    Field,
    each,
)

_WEIGHTS = Check(
    'must be weights of one stage or more, none of them negative', lambda values: len(values) > 0 and min(values) >= 0
)
_SCHEDULE = Field('cosine', 'Learning rate schedule.')
_MAX_GRAD_NORM = Field(1.0, 'Largest norm of a gradient; 0 for no bound.', NOT_NEGATIVE)
_LEARNING_RATES = Field(
    (0.01, 0.03, 0.1),
    'Learning rates to choose from by `tuning`, weakest first. A single one trains on all clean images.',
    RISING_POSITIVE,
)
_ADAM_RATES = _LEARNING_RATES._replace(doc=_LEARNING_RATES.doc.replace('Learning rates', 'Learning rates of Adam'))


def _epochs(default: int, doc: str = 'Epochs.') -> Field:
    return Field(default, doc, POSITIVE)


DEFENSES: dict[str, Any] = {
    'ft': {
        'epochs': _epochs(40),
        'learning_rates': _LEARNING_RATES,
        'schedule': _SCHEDULE,
        'max_grad_norm': _MAX_GRAD_NORM,
    },
    'fst': {
        'alpha': Field(0.1, 'Weight of the penalty on a head like the infected one.', NOT_NEGATIVE),
        'epochs': _epochs(10),
        'learning_rates': _LEARNING_RATES,
        'schedule': _SCHEDULE,
        'max_grad_norm': _MAX_GRAD_NORM,
    },
    'ft_sam': {
        'rho': Field(2.0, 'Radius of the neighbourhood of the weights, relative to each weight.', NOT_NEGATIVE),
        'smoothing': Field(0.1, 'Probability that the labels give to the wrong classes together.', BELOW_ONE),
        'epochs': _epochs(100),
        'learning_rates': _LEARNING_RATES._replace(default=(0.01,)),
        'schedule': _SCHEDULE,
        'max_grad_norm': _MAX_GRAD_NORM._replace(default=0.0),
    },
    'd3': {
        'weight': Field(10.0, 'Weight of the clean loss beside the distance of the head.', POSITIVE),
        'threshold': Field(0.1, 'Cross-entropy of an image below which it has no gradient.', NOT_NEGATIVE),
        'epochs': _epochs(100),
        'learning_rates': _LEARNING_RATES._replace(default=(0.01,)),
        'schedule': _SCHEDULE,
        'max_grad_norm': _MAX_GRAD_NORM._replace(default=0.0),
    },
    'nad': {
        'teacher_epochs': _epochs(10, 'Epochs of the teacher.'),
        'epochs': _epochs(40, 'Epochs of the student.'),
        'learning_rates': _LEARNING_RATES._replace(doc=f'{_LEARNING_RATES.doc} Teacher and student use the same.'),
        'schedule': _SCHEDULE,
        'max_grad_norm': _MAX_GRAD_NORM,
        'betas': Field((500.0, 1000.0, 1000.0), "Weights of the last stages' distillation, last stage last.", _WEIGHTS),
    },
    'mcr': {
        'endpoint_epochs': _epochs(40, 'Epochs of the fine-tuned end of the curve.'),
        'epochs': _epochs(40, "Epochs of the curve's middle point."),
        'learning_rate': Field(0.1, 'Learning rate. A candidate near 0 undoes too large a one.', POSITIVE),
        'schedule': _SCHEDULE,
        'max_grad_norm': _MAX_GRAD_NORM,
        'candidates': Field(
            (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
            'Points of the curve to choose from by `tuning`; 0 is the infected model, 1 the fine-tuned one.',
            each(OPEN_SHARE),
        ),
    },
    'fp': {
        'epochs': _epochs(40, 'Epochs of the fine-tuning after the pruning.'),
        'learning_rates': _LEARNING_RATES,
        'schedule': _SCHEDULE,
        'max_grad_norm': _MAX_GRAD_NORM,
    },
    'anp': {
        'iterations': Field(2000, 'Training steps of the masks.', POSITIVE),
        'eps': Field(0.4, 'Size of the noise, relative to the scales and biases of BatchNorm.', POSITIVE_SHARE),
        'clean_weight': Field(
            0.2, 'Weight of the loss without noise; the loss with noise has the rest.', SHARE_OR_ZERO
        ),
        'learning_rate': Field(0.2, 'Learning rate of the masks.', POSITIVE),
    },
    'sau': {
        'eps': Field(0.2, 'Radius of the perturbations, Linf, in units of [0, 1] pixels.', IN_PIXELS),
        'step_size': Field(0.2, 'Length of a step of the perturbations, in the same units.', IN_PIXELS),
        'steps': Field(5, 'Steps of the perturbations.', POSITIVE),
        'attack_weight': Field(0.01, 'Perturbations: weight of fooling both models.', NOT_NEGATIVE),
        'sharing_weight': Field(1.0, 'Perturbations: weight of equal predictions of both models.', NOT_NEGATIVE),
        'clean_weight': Field(1.0, 'Training: weight of clean images.', NOT_NEGATIVE),
        'adversarial_weight': Field(0.0, 'Training: weight of perturbed images with true labels.', NOT_NEGATIVE),
        'unlearning_weight': Field(1.0, "Training: weight of leaving the infected model's labels.", NOT_NEGATIVE),
        'epochs': _epochs(100),
        'learning_rates': _ADAM_RATES._replace(default=(0.0001,)),
    },
    'i_bau': {
        'rounds': Field(5, 'Rounds of searching a perturbation for all images and unlearning it.', POSITIVE),
        'search_learning_rate': Field(10.0, 'Learning rate of the perturbation.', POSITIVE),
        'penalty': Field(0.001, "Weight of the perturbation's squared L2 norm.", NOT_NEGATIVE),
        'radius': Field(
            0.0, 'Largest L2 norm of the perturbation, in units of [0, 1] pixels; 0 for no bound.', NOT_NEGATIVE
        ),
        'perturbed_share': Field(0.01, "Share of a batch's images with the perturbation.", POSITIVE_SHARE),
        'inner_learning_rate': Field(0.1, 'Learning rate of the step that is differentiated.', POSITIVE),
        'fixed_point_steps': Field(5, 'Terms of the implicit gradient.', POSITIVE),
        'learning_rates': _ADAM_RATES._replace(default=(0.001,)),
    },
    'rnp': {
        'unlearning_epochs': _epochs(20, 'Unlearning: largest number of epochs.'),
        'unlearning_rate': Field(0.01, 'Unlearning: learning rate, a tenth of it after 10 epochs.', POSITIVE),
        'stop_accuracy': Field(0.2, 'Unlearning: training accuracy at which it ends.', SHARE_OR_ZERO),
        'recovering_epochs': _epochs(20, 'Recovering: epochs of the masks.'),
        'recovering_rate': Field(0.2, 'Recovering: learning rate of the masks.', POSITIVE),
        'recover_weight': Field(0.2, 'Recovering: weight of the cross-entropy.', POSITIVE),
    },
    'clp': {
        'thresholds': Field(
            (3.0,),
            "Gains of channels above their layer's mean that are pruned, in standard deviations, to choose from by "
            '`tuning`. A single one needs no images.',
            each(NOT_NEGATIVE),
        ),
    },
    # The options of AFT are those of the rounds after the first.
    'pbe': filled_section('default', epochs=4, adversarial_epochs=4.0, recalibrate=False)
    | {
        'first_share': Field(0.05, 'First round: share of the untrusted training set.', POSITIVE_SHARE),
        'first_epochs': _epochs(10, 'First round: epochs, on adversarial examples alone.'),
        'first_learning_rate': Field(0.1, 'First round: learning rate.', POSITIVE),
        'keep': Field(
            (0.2, 0.5, 0.7),
            'Further rounds, one value each: most consistent share of every label that is trained on.',
            each(POSITIVE_SHARE),
        ),
    },
    'aft': AFT_SECTION,
    # AFT without a reference model, for comparison.
    'aft_universal': preset_section('default'),
    'aft_released': preset_section('released'),
}
