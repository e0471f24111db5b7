"""Options of AFT (`aft_jax.defenses.aft`), and the perturbations that they describe."""

from typing import NamedTuple, cast

from aft_jax.adversarial.kinds import Kind
from aft_jax.adversarial.perturbations import PerturbationSpec, spec_of_any_size
from aft_jax.config import split_names


class AftOptions(NamedTuple):
    """Section `aft` of the config.

    Attributes:
        reference_steps: Length of the training of the reference model in steps.
        reference_learning_rate: Largest learning rate of the reference model.
        reference_penalty: Weight of the penalty that keeps the head of the reference unlike the infected one.
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
        averaging: Share of the averaged weights that a step keeps, in both stages.
        max_grad_norm: Largest norm of a gradient, in both stages. 0 for no limit.
    """

    reference_steps: int
    reference_learning_rate: float
    reference_penalty: float
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
    named = named_kinds(options.universal, options.per_image)
    return tuple(spec_of_any_size(kind, image_shape, universal) for kind, universal in named)


def named_kinds(universal: str, per_image: str) -> list[tuple[Kind, bool]]:
    """Parses two comma lists of kinds: each kind, and whether its perturbation is universal."""
    lists = ((universal, True), (per_image, False))
    return [(cast(Kind, name), shared) for names, shared in lists for name in split_names(names)]
