"""Adversarial perturbations of four kinds, each universal (one for all images of a batch) or one for each image.

A per-image perturbation uses any weakness of the model near that image. A backdoor's trigger works on every image, and
so does a universal adversarial perturbation. Its gradient is a sum over images: weaknesses near single images cancel
out, and those that all images share remain. Sample-specific triggers need per-image perturbations. The kinds:

    linf    x' = clip(x + d),      |d| <= size in each pixel                  (patterns over the whole image)
    l2      x' = clip(x + d),      ||d|| <= size                              (small regions of strong contrast)
    sparse  x' = x but for `size` pixels of each step, which become 0 or 1    (patches)
    warp    x' = x sampled at positions shifted by up to `size` pixels        (distortions)

A step moves d by a quarter of its size along the sign (l2: the direction) of the gradient. A sparse step sets the
pixels with the largest gradient magnitude. For a per-image perturbation the score is |gradient| times the distance to
the new value (0 or 1). A warp is interpolated bilinearly between GRID x GRID points.

Source: Moosavi-Dezfooli et al., "Universal adversarial perturbations" (2017), for the idea; warps: Xiao et al.,
"Spatially Transformed Adversarial Examples" (2018), for single images.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aft_jax.adversarial.pgd import Logits, direction, project, random_in_ball, repeat, slow_in_loops
from aft_jax.ops.resampling import sample_bilinear

Kind = Literal['linf', 'l2', 'sparse', 'warp']
KINDS: tuple[Kind, ...] = ('linf', 'l2', 'sparse', 'warp')
GRID = 7
STEP = 0.25


class PerturbationSpec(NamedTuple):
    """Kind and size of a perturbation.

    Attributes:
        kind: One of KINDS.
        size: Size in the unit of the kind (see above). For 'sparse' it is the number of pixels in each step.
        universal: Whether all images of a batch have the same perturbation.
    """

    kind: Kind
    size: float
    universal: bool = True

    @property
    def warm_started(self) -> bool:
        """Whether a training step starts from the perturbation of the step before.

        The pixels of 'sparse' are chosen for one model, so they start from zero at each step.
        """
        return self.universal and self.kind != 'sparse'


class Perturbation(NamedTuple):
    """A universal perturbation (N = 1), or one for each of N images.

    Attributes:
        values: linf and l2: the sum's second term, [N, H, W, C]. sparse: new values of pixels, [N, H, W, C]. warp: rows
            and columns by which the points of the grid are shifted, in pixels, [N, GRID, GRID, 2].
        chosen: sparse: 1 in the pixels that are set, [N, H, W, 1]. Other kinds: scalar 1.
    """

    values: jax.Array
    chosen: jax.Array


def init(spec: PerturbationSpec, key: jax.Array, image_shape: tuple[int, ...]) -> Perturbation:
    """Draws a random perturbation; a sparse one starts empty.

    Args:
        spec: Kind and size.
        key: PRNG key.
        image_shape: Shape (B, H, W, C) of the images to be perturbed.
    """
    count = 1 if spec.universal else image_shape[0]
    shape, one = (count, *image_shape[1:]), jnp.ones((), jnp.float32)
    match spec.kind:
        case 'linf' | 'l2':
            return Perturbation(random_in_ball(key, shape, spec.size, spec.kind), one)
        case 'sparse':
            return Perturbation(jnp.zeros(shape, jnp.float32), jnp.zeros((*shape[:3], 1), jnp.float32))
        case 'warp':
            size = spec.size
            return Perturbation(jax.random.uniform(key, (count, GRID, GRID, 2), jnp.float32, -size, size), one)


def apply(spec: PerturbationSpec, perturbation: Perturbation, images: jax.Array) -> jax.Array:
    """Perturbs images [B, H, W, C], float32 in [0, 1]."""
    match spec.kind:
        case 'linf' | 'l2':
            return jnp.clip(images + perturbation.values, 0.0, 1.0)
        case 'sparse':
            # The last term is zero. It passes on the gradient of pixels that are not set.
            unset = (perturbation.values - jax.lax.stop_gradient(perturbation.values)) * (1 - perturbation.chosen)
            return images + (perturbation.values - images) * perturbation.chosen + unset
        case 'warp':
            height, width = images.shape[1:3]
            row_weights, column_weights = _interpolation(height), _interpolation(width)
            shifts = jnp.einsum(
                'hi,bijc,wj->bhwc', row_weights, perturbation.values, column_weights, precision='highest'
            )
            rows = jnp.arange(height, dtype=jnp.float32)[None, :, None] + shifts[..., 0]
            columns = jnp.arange(width, dtype=jnp.float32)[None, None, :] + shifts[..., 1]
            shape = (len(images), height, width)
            return sample_bilinear(images, jnp.broadcast_to(rows, shape), jnp.broadcast_to(columns, shape))


def advance(spec: PerturbationSpec, perturbation: Perturbation, gradient: jax.Array, images: jax.Array) -> Perturbation:
    """Takes one step up the loss.

    Args:
        spec: Kind and size.
        perturbation: Perturbation before the step.
        gradient: Gradient of the loss, in the shape of `perturbation.values`.
        images: float32 [B, H, W, C] in [0, 1], unperturbed.
    """
    size, values = spec.size, perturbation.values
    match spec.kind:
        case 'linf' | 'l2':
            moved = values + STEP * size * direction(gradient, spec.kind)
            return perturbation._replace(values=project(moved, size, spec.kind))
        case 'sparse':
            targets = (gradient > 0).astype(jnp.float32)
            distance = jnp.ones_like(values) if spec.universal else jnp.abs(targets - images)
            scores = (jnp.abs(gradient) * distance).sum(axis=-1) * (1 - perturbation.chosen[..., 0])
            scores = scores.reshape(len(scores), -1)
            _, highest = jax.lax.top_k(scores, int(size))
            new = jnp.put_along_axis(jnp.zeros_like(scores), highest, 1.0, axis=1, inplace=False)
            new = new.reshape(perturbation.chosen.shape)
            return Perturbation(jnp.where(new > 0, targets, values), perturbation.chosen + new)
        case 'warp':
            return perturbation._replace(values=jnp.clip(values + STEP * size * jnp.sign(gradient), -size, size))


def batch_slices(count: int, specs: tuple[PerturbationSpec, ...]) -> list[slice]:
    """Divides `count` images into equal parts, one for each spec, in the order of the specs."""
    ends = [count * i // len(specs) for i in range(len(specs) + 1)]
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def init_all(
    specs: tuple[PerturbationSpec, ...], key: jax.Array, image_shape: tuple[int, ...]
) -> tuple[Perturbation, ...]:
    """Draws a perturbation for each spec, for images of shape (B, H, W, C) that are divided among the specs."""
    keys = jax.random.split(key, len(specs))
    return tuple(
        init(spec, k, (part.stop - part.start, *image_shape[1:]))
        for spec, k, part in zip(specs, keys, batch_slices(image_shape[0], specs), strict=True)
    )


def joint_attack(
    logits: Logits,
    images: jax.Array,
    labels: jax.Array,
    specs: tuple[PerturbationSpec, ...],
    perturbations: tuple[Perturbation, ...],
    *,
    steps: int,
) -> tuple[jax.Array, tuple[Perturbation, ...]]:
    """Computes adversarial examples with several perturbations, which share the gradient of each step.

    Args:
        logits: Classifier in evaluation mode, float32 [B, H, W, C] -> float32 [B, K].
        images: float32 [B, H, W, C] in [0, 1]. Each spec gets an equal part of them.
        labels: int32 [B], true classes.
        specs: Kinds and sizes.
        perturbations: Perturbation of each spec before the first step (`init_all`).
        steps: Number of steps.

    Returns:
        The adversarial examples, float32 [B, H, W, C], in the order of the images; the perturbations after the last
        step.
    """
    parts = [images[part] for part in batch_slices(len(labels), specs)]

    def examples(perturbations: tuple[Perturbation, ...]) -> jax.Array:
        return jnp.concatenate([apply(*each) for each in zip(specs, perturbations, parts, strict=True)])

    def loss(values: tuple[jax.Array, ...], perturbations: tuple[Perturbation, ...]) -> jax.Array:
        moved = tuple(p._replace(values=new) for p, new in zip(perturbations, values, strict=True))
        return optax.softmax_cross_entropy_with_integer_labels(logits(examples(moved)), labels).sum()

    def step(perturbations: tuple[Perturbation, ...]) -> tuple[Perturbation, ...]:
        gradients = jax.grad(loss)(tuple(p.values for p in perturbations), perturbations)
        return tuple(advance(*each) for each in zip(specs, perturbations, gradients, parts, strict=True))

    perturbations = repeat(step, perturbations, steps, unroll=slow_in_loops(logits))
    return examples(perturbations), perturbations


def _interpolation(length: int) -> np.ndarray:
    """Computes weights float32 [length, GRID] that interpolate linearly between GRID evenly spaced points.

    The first and last point lie on the first and last pixel.
    """
    positions = np.linspace(0, GRID - 1, length)
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(GRID)[None])).astype(np.float32)
