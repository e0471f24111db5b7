"""Options of AFT (`aft_jax.defenses.aft_universal`), and the attacks that they describe."""

import math
from typing import NamedTuple

from aft_jax.adversarial.perturbations import PerturbationSpec
from aft_jax.adversarial.pgd import PGD, Norm
from aft_jax.defenses.aft_options import named_kinds


class UniversalAftOptions(NamedTuple):
    """Sections `aft_universal` and `aft_released` of the config, with the preset filled in.

    Attributes:
        norm: Norm of PGD, 'linf' or 'l2'.
        eps: Radius of PGD, and size of 'linf' perturbations, in units of [0, 1] pixels.
        step_size: Step of PGD, in the same units.
        universal: Kinds of universal perturbations, comma-separated. They and `per_image` take the place of PGD.
        per_image: Kinds of per-image perturbations, comma-separated.
        rms_eps: Size of 'l2' perturbations, a root mean square over the pixels of an image.
        sparse_share: Size of 'sparse' perturbations, a share of the pixels.
        warp_share: Size of 'warp' perturbations, a share of the image's side.
        renew_every: Steps after which universal perturbations start from random ones again.
        pgd_steps: Steps of PGD, or of all perturbations.
        random_start: Whether PGD starts at a random point.
        clip: Whether examples of PGD stay in [0, 1].
        epochs: Length of the defense.
        adversarial_epochs: Length of its adversarial phase.
        adversarial_share: Share of a batch that is replaced by adversarial examples in the adversarial phase.
        adversarial_weight: Weight of the cross-entropy of adversarial examples.
        distillation: Weight of the divergence from the infected model's predictions on clean images.
        cutmix: Largest share of a clean image's area that another image replaces. 0 for none.
        recalibrate: Whether BatchNorm statistics are measured again at the end, on clean images.
        learning_rate: Learning rate of the first step.
        schedule: 'constant' or 'cosine'.
        max_grad_norm: Largest norm of a gradient. 0 for no limit.
    """

    norm: Norm
    eps: float
    step_size: float
    universal: str
    per_image: str
    rms_eps: float
    sparse_share: float
    warp_share: float
    renew_every: int
    pgd_steps: int
    random_start: bool
    clip: bool
    epochs: float
    adversarial_epochs: float
    adversarial_share: float
    adversarial_weight: float
    distillation: float
    cutmix: float
    recalibrate: bool
    learning_rate: float
    schedule: str
    max_grad_norm: float


def pgd_of(options: UniversalAftOptions) -> PGD:
    """Selects the options of PGD."""
    return PGD(
        eps=options.eps,
        step_size=options.step_size,
        steps=options.pgd_steps,
        norm=options.norm,
        random_start=options.random_start,
        clip=options.clip,
    )


def specs_of(options: UniversalAftOptions, image_shape: tuple[int, ...]) -> tuple[PerturbationSpec, ...]:
    """Computes kinds and sizes of the perturbations for images of shape (H, W, C); empty for PGD."""
    height, width, channels = image_shape
    sizes = {
        'linf': options.eps,
        'l2': options.rms_eps * math.sqrt(height * width * channels),
        'sparse': max(1, round(options.sparse_share * height * width / options.pgd_steps)),
        'warp': options.warp_share * min(height, width),
    }
    named = named_kinds(options.universal, options.per_image)
    return tuple(PerturbationSpec(kind, sizes[kind], universal) for kind, universal in named)
