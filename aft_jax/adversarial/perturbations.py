"""Adversarial perturbations of several kinds, each universal (one for all images of a batch) or one for each image.

A per-image perturbation uses any weakness of the model near that image. A backdoor's trigger works on every image, and
so does a universal adversarial perturbation. Its gradient is a sum over images: weaknesses near single images cancel
out, and those that all images share remain. Sample-specific triggers need per-image perturbations. `kinds` has the
kinds and their steps.

Nobody knows the size of a trigger. A spec may therefore have a range of sizes, of which each perturbation draws one.

Source: Moosavi-Dezfooli et al., "Universal adversarial perturbations" (2017), for the idea; Gao et al., "On the
Effectiveness of Adversarial Training against Backdoor Attacks" (2022), for several kinds in one training.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from aft_jax.adversarial.kinds import PLACED_BY_GRADIENT, RULES, Kind, Perturbation, Start
from aft_jax.adversarial.pgd import Logits, repeat

# Images [B, H, W, C] -> a value [B] of each, which an attack raises.
Objective = Callable[[jax.Array], jax.Array]


class PerturbationSpec(NamedTuple):
    """Kind and size of a perturbation.

    Attributes:
        kind: One of KINDS.
        size: Size in the unit of the kind. With `smallest` it is the largest size.
        universal: Whether all images of a batch have the same perturbation.
        smallest: Smallest size. Sizes are then drawn with a uniform logarithm. 0 for always `size`.
    """

    kind: Kind
    size: float
    universal: bool = True
    smallest: float = 0.0

    @property
    def warm_started(self) -> bool:
        """Whether a training step can start from the perturbation of the step before.

        The pixels of 'sparse' are chosen for one model, and so is the place of a rectangle or a region.
        """
        return self.universal and self.kind != 'sparse' and self.kind not in PLACED_BY_GRADIENT


def untargeted(logits: Logits, labels: jax.Array) -> Objective:
    """Builds the objective of an untargeted attack: the cross-entropy of `logits` against int32 `labels` [B]."""
    return lambda images: optax.softmax_cross_entropy_with_integer_labels(logits(images), labels)


def init(spec: PerturbationSpec, key: jax.Array, images: jax.Array, gradient: jax.Array | None = None) -> Perturbation:
    """Draws a random perturbation; a sparse one starts empty.

    Args:
        spec: Kind and size.
        key: PRNG key.
        images: float32 [B, H, W, C], images to be perturbed.
        gradient: Gradient of the loss at the images, [B, H, W, C]; needed for the kinds that are placed by it.
    """
    count = 1 if spec.universal else len(images)
    size = jnp.full((count, 1, 1, 1), spec.size, jnp.float32)
    if spec.smallest:
        share = jax.random.uniform(jax.random.fold_in(key, 0), size.shape)
        size = size * jnp.exp(share * math.log(spec.smallest / spec.size))
    return RULES[spec.kind].init(key, Start(size, images, gradient))


def apply(spec: PerturbationSpec, perturbation: Perturbation, images: jax.Array) -> jax.Array:
    """Perturbs images [B, H, W, C], float32 in [0, 1]."""
    return RULES[spec.kind].apply(perturbation, images)


def renew(fresh: Perturbation, carried: Perturbation, renews: jax.Array) -> Perturbation:
    """Chooses the perturbation that an attack starts with: the fresh one where `renews`, a bool scalar, is true."""
    return jax.tree.map(lambda new, old: jnp.where(renews, new, old), fresh, carried)


def batch_slices(count: int, specs: tuple[PerturbationSpec, ...]) -> list[slice]:
    """Divides `count` images into equal parts, one for each spec, in the order of the specs."""
    ends = [count * i // len(specs) for i in range(len(specs) + 1)]
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def init_all(
    specs: tuple[PerturbationSpec, ...], key: jax.Array, images: jax.Array, gradient: jax.Array | None = None
) -> tuple[Perturbation, ...]:
    """Draws a perturbation for each spec, which gets its part of the images. Other arguments are those of `init`."""
    keys = jax.random.split(key, len(specs))
    return tuple(
        init(spec, k, images[part], None if gradient is None else gradient[part])
        for spec, k, part in zip(specs, keys, batch_slices(len(images), specs), strict=True)
    )


def joint_attack(
    objective: Objective,
    images: jax.Array,
    specs: tuple[PerturbationSpec, ...],
    perturbations: tuple[Perturbation, ...],
    *,
    steps: int,
    unroll: bool,
) -> tuple[jax.Array, tuple[Perturbation, ...]]:
    """Computes adversarial examples with several perturbations, which share the gradient of each step.

    Args:
        objective: Function that the examples raise, image by image.
        images: float32 [B, H, W, C] in [0, 1]. Each spec gets an equal part of them.
        specs: Kinds and sizes.
        perturbations: Perturbation of each spec before the first step (`init_all`).
        steps: Number of steps.
        unroll: Whether each step is compiled, instead of one loop.

    Returns:
        The adversarial examples, float32 [B, H, W, C], in the order of the images; the perturbations after the last
        step.
    """
    parts = [images[part] for part in batch_slices(len(images), specs)]

    def examples(perturbations: tuple[Perturbation, ...]) -> jax.Array:
        return jnp.concatenate([apply(*each) for each in zip(specs, perturbations, parts, strict=True)])

    def total(values: tuple[jax.Array, ...], perturbations: tuple[Perturbation, ...]) -> jax.Array:
        moved = tuple(p._replace(values=new) for p, new in zip(perturbations, values, strict=True))
        return objective(examples(moved)).sum()

    def step(perturbations: tuple[Perturbation, ...]) -> tuple[Perturbation, ...]:
        gradients = jax.grad(total)(tuple(p.values for p in perturbations), perturbations)
        return tuple(
            RULES[spec.kind].advance(*each) for spec, *each in zip(specs, perturbations, gradients, parts, strict=True)
        )

    perturbations = repeat(step, perturbations, steps, unroll=unroll)
    return examples(perturbations), perturbations


# Smallest and largest size of each kind, from hardly visible to obvious, for images of any shape. linf, low_frequency:
# pixels in [0, 1]. l2: root mean square over the pixels. rectangle, region: share of the area. warp: share of a side.
SIZE_RANGES: dict[Kind, tuple[float, float]] = {
    'linf': (0.03, 0.16),
    'l2': (0.05, 0.2),
    'low_frequency': (0.06, 0.3),
    'rectangle': (0.005, 0.15),
    'region': (0.005, 0.15),
    'tone': (0.1, 0.6),
    'blur': (0.3, 3.0),
    'warp': (0.015, 0.08),
    'affine': (0.03, 0.15),
}


def spec_of_any_size(
    kind: Kind, image_shape: tuple[int, ...], universal: bool = True, factor: float = 1.0
) -> PerturbationSpec:
    """Builds a spec whose sizes have the range of `SIZE_RANGES`.

    Args:
        kind: Key of `SIZE_RANGES`.
        image_shape: (H, W, C).
        universal: Whether all images of a batch have the same perturbation.
        factor: Factor of the largest size.
    """
    height, width, channels = image_shape
    unit = {'l2': math.sqrt(height * width * channels), 'warp': float(min(height, width))}.get(kind, 1.0)
    return PerturbationSpec(kind, largest_size(kind, factor) * unit, universal, SIZE_RANGES[kind][0] * unit)


def largest_size(kind: Kind, factor: float) -> float:
    """Computes the largest size of a kind. The factor leaves out tones, since larger ones would blank images."""
    return SIZE_RANGES[kind][1] * (1.0 if kind == 'tone' else factor)
