"""Options of AFT (`aft_jax.defenses.aft`), and the perturbations that they describe."""

from typing import NamedTuple, cast

from aft_jax.adversarial.kinds import Kind
from aft_jax.adversarial.perturbations import PerturbationSpec, spec_of_any_size
from aft_jax.config import split_names
from aft_jax.defenses.reference import ReferenceOptions


class AftOptions(NamedTuple):
    """Section `aft` of the config.

    Attributes:
        reference: Options of the reference model, from the same section.
        steps: Length of the adversarial fine-tuning in steps.
        learning_rate: Largest learning rate.
        shift: Largest shift of augmented images, a share of the image's side.
        universal: Kinds of universal perturbations, comma-separated.
        per_image: Kinds of per-image perturbations, comma-separated.
        renew_every: Steps after which a universal perturbation starts again.
        pgd_steps: Steps of the attack.
        adversarial_share: Adversarial examples of a step, a share of its clean images.
        adversarial_weight: Weight of the divergence from the reference model on adversarial examples.
        cross_entropy: Weight of the cross-entropy of clean images.
        distillation: Weight of the divergence from the infected model on clean images.
        temperature: Temperature of that divergence.
        mixture_weight: Weight of the divergence from what both models agree on, on mixtures of clean images.
        averaging: Share of the averaged weights that a step keeps.
        max_grad_norm: Largest norm of a gradient. 0 for no limit.
    """

    reference: ReferenceOptions
    steps: int
    learning_rate: float
    shift: float
    universal: str
    per_image: str
    renew_every: int
    pgd_steps: int
    adversarial_share: float
    adversarial_weight: float
    cross_entropy: float
    distillation: float
    temperature: float
    mixture_weight: float
    averaging: float
    max_grad_norm: float


def specs_of(options: AftOptions, image_shape: tuple[int, ...]) -> tuple[PerturbationSpec, ...]:
    """Builds the perturbations for images of shape (H, W, C), each of a random size."""
    named = [(name, True) for name in split_names(options.universal)]
    named += [(name, False) for name in split_names(options.per_image)]
    return tuple(spec_of_any_size(cast(Kind, name), image_shape, universal) for name, universal in named)
