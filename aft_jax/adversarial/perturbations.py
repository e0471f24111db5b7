"""Adversarial changes of four kinds, of which each image has its own, or all images of a batch share one.

The adversarial example of a single image uses whatever is weak about that image. A backdoor's trigger is a change that
works on every image; so is a shared change, a universal adversarial perturbation, and the gradient that leads to it is
summed over images, where the weaknesses of each cancel out and those of the model remain. A trigger that is another
one on every image needs changes of each image's own. The kinds:

    linf    x' = clip(x + d),      |d| <= size in each pixel                  (patterns over the whole image)
    l2      x' = clip(x + d),      ||d|| <= size                              (small changes of strong contrast)
    sparse  x' = x but for `size` pixels of each step, which become 0 or 1    (patches)
    warp    x' = x sampled at places that are shifted by up to `size` pixels  (distortions)

A step moves d by a quarter of its size along the sign (l2: the direction) of the gradient. A sparse step sets the
pixels in which the gradient is longest; where an image has its own, the gradient times the way that is left to go. A
warp is bilinear between GRID x GRID points.

Source: Moosavi-Dezfooli et al., "Universal adversarial perturbations" (2017), for the idea; warps: Xiao et al.,
"Spatially Transformed Adversarial Examples" (2018), for single images.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aft_jax.adversarial.pgd import Logits, direction, project, random_in_ball, repeat
from aft_jax.ops.resampling import sample_bilinear

Kind = Literal['linf', 'l2', 'sparse', 'warp']
KINDS: tuple[Kind, ...] = ('linf', 'l2', 'sparse', 'warp')
GRID = 7
STEP = 0.25


class PerturbationSpec(NamedTuple):
    """A kind of change, its size (see above; of 'sparse', the pixels in each step), and whether images share it."""

    kind: Kind
    size: float
    shared: bool = True

    @property
    def warm_started(self) -> bool:
        """Whether the next step goes on with a change; not with 'sparse', whose pixels are chosen for one model."""
        return self.shared and self.kind != 'sparse'


class Perturbation(NamedTuple):
    """One change that images share, N = 1, or one for each of N images.

    Attributes:
        values: linf and l2: what is added, [N, H, W, C]. sparse: what pixels become, likewise. warp: rows and columns
            by which the places of the grid are shifted, in pixels, [N, GRID, GRID, 2].
        chosen: sparse: 1 in the pixels that are set, [N, H, W, 1]; else 1.
    """

    values: jax.Array
    chosen: jax.Array


def start(family: PerturbationSpec, key: jax.Array, images: tuple[int, ...]) -> Perturbation:
    """Returns a random change, or (sparse) none yet.

    Args:
        family: Of which kind.
        key: PRNG key.
        images: The shape (B, H, W, C) of those to be changed.
    """
    count = 1 if family.shared else images[0]
    shape, one = (count, *images[1:]), jnp.ones((), jnp.float32)
    match family.kind:
        case 'linf' | 'l2':
            return Perturbation(random_in_ball(key, shape, family.size, family.kind), one)
        case 'sparse':
            return Perturbation(jnp.zeros(shape, jnp.float32), jnp.zeros((*shape[:3], 1), jnp.float32))
        case 'warp':
            size = family.size
            return Perturbation(jax.random.uniform(key, (count, GRID, GRID, 2), jnp.float32, -size, size), one)


def apply(family: PerturbationSpec, change: Perturbation, images: jax.Array) -> jax.Array:
    """Returns the images [B, H, W, C], float32 in [0, 1], with the change in each of them."""
    match family.kind:
        case 'linf' | 'l2':
            return jnp.clip(images + change.values, 0.0, 1.0)
        case 'sparse':
            # What is added is zero, and lets the gradient of every pixel through, of those too that are not set.
            unset = (change.values - jax.lax.stop_gradient(change.values)) * (1 - change.chosen)
            return images + (change.values - images) * change.chosen + unset
        case 'warp':
            height, width = images.shape[1:3]
            rows_of, columns_of = _between_points(height), _between_points(width)
            shifts = jnp.einsum('hi,bijc,wj->bhwc', rows_of, change.values, columns_of, precision='highest')
            rows = jnp.arange(height, dtype=jnp.float32)[None, :, None] + shifts[..., 0]
            columns = jnp.arange(width, dtype=jnp.float32)[None, None, :] + shifts[..., 1]
            places = (len(images), height, width)
            return sample_bilinear(images, jnp.broadcast_to(rows, places), jnp.broadcast_to(columns, places))


def advance(family: PerturbationSpec, change: Perturbation, gradient: jax.Array, images: jax.Array) -> Perturbation:
    """Returns the change one step further up the loss.

    Args:
        family: Of which kind.
        change: Before the step.
        gradient: Of the loss, in the shape of `change.values`.
        images: float32 [B, H, W, C] in [0, 1], without the change.
    """
    size, values = family.size, change.values
    match family.kind:
        case 'linf' | 'l2':
            moved = values + STEP * size * direction(gradient, family.kind)
            return change._replace(values=project(moved, size, family.kind))
        case 'sparse':
            wanted = (gradient > 0).astype(jnp.float32)
            way = jnp.ones_like(values) if family.shared else jnp.abs(wanted - images)
            free = (jnp.abs(gradient) * way).sum(axis=-1) * (1 - change.chosen[..., 0])
            free = free.reshape(len(free), -1)
            _, longest = jax.lax.top_k(free, int(size))
            new = jnp.put_along_axis(jnp.zeros_like(free), longest, 1.0, axis=1, inplace=False)
            new = new.reshape(change.chosen.shape)
            return Perturbation(jnp.where(new > 0, wanted, values), change.chosen + new)
        case 'warp':
            return change._replace(values=jnp.clip(values + STEP * size * jnp.sign(gradient), -size, size))


def parts(count: int, specs: tuple[PerturbationSpec, ...]) -> list[slice]:
    """Returns which of `count` images each family has: equal parts, in their order."""
    ends = [count * i // len(specs) for i in range(len(specs) + 1)]
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def init_all(specs: tuple[PerturbationSpec, ...], key: jax.Array, images: tuple[int, ...]) -> tuple[Perturbation, ...]:
    """Returns what `joint_attack` begins with for images of shape (B, H, W, C), anew for each family."""
    keys = jax.random.split(key, len(specs))
    return tuple(
        start(family, k, (part.stop - part.start, *images[1:]))
        for family, k, part in zip(specs, keys, parts(images[0], specs), strict=True)
    )


def joint_attack(
    logits: Logits,
    images: jax.Array,
    labels: jax.Array,
    specs: tuple[PerturbationSpec, ...],
    changes: tuple[Perturbation, ...],
    steps: int,
    *,
    unroll: bool | None = None,
) -> tuple[jax.Array, tuple[Perturbation, ...]]:
    """Returns adversarial examples, an equal part of the images by each family, and the changes.

    Args:
        logits: Classifier in evaluation mode, float32 [B, H, W, C] -> float32 [B, K].
        images: float32 [B, H, W, C] in [0, 1].
        labels: int32 [B], true.
        specs: Of changes.
        changes: Of each, to begin with (`init_all`).
        steps: How many steps all of them take.
        unroll: As for `adversarial.repeat`.

    Returns:
        float32 [B, H, W, C], the images of the first family first, and the changes after the last step.
    """
    theirs = [images[part] for part in parts(len(labels), specs)]

    def examples(changes: tuple[Perturbation, ...]) -> jax.Array:
        return jnp.concatenate([apply(*each) for each in zip(specs, changes, theirs, strict=True)])

    def loss(values: tuple[jax.Array, ...], changes: tuple[Perturbation, ...]) -> jax.Array:
        moved = tuple(change._replace(values=new) for change, new in zip(changes, values, strict=True))
        return optax.softmax_cross_entropy_with_integer_labels(logits(examples(moved)), labels).sum()

    def step(changes: tuple[Perturbation, ...]) -> tuple[Perturbation, ...]:
        gradients = jax.grad(loss)(tuple(change.values for change in changes), changes)
        return tuple(advance(*each) for each in zip(specs, changes, gradients, theirs, strict=True))

    changes = repeat(step, changes, steps, unroll)
    return examples(changes), changes


def _between_points(length: int) -> np.ndarray:
    """float32 [length, GRID]: what each point of a line gives to each pixel, the ends meeting the ends."""
    positions = np.linspace(0, GRID - 1, length)
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(GRID)[None])).astype(np.float32)
