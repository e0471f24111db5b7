"""Universal adversarial perturbations: one change that fools a classifier on all images of a batch at once.

The adversarial example of a single image, as `aft_jax.adversarial` makes it, uses whatever is weak about that image. A
backdoor's trigger is a change that works on every image; so is a universal perturbation, and the gradient that leads to
it is summed over images, where the weaknesses of each cancel out and those of the model remain. Of four kinds:

    linf    x' = clip(x + d),      |d| <= size in each pixel                  (patterns over the whole image)
    l2      x' = clip(x + d),      ||d|| <= size                              (small changes of strong contrast)
    sparse  x' = x but for `size` pixels of each step, which become 0 or 1    (patches)
    warp    x' = x sampled at places that are shifted by up to `size` pixels  (distortions)

A step moves d by a quarter of its size along the sign (l2: the direction) of the gradient. A sparse step sets the
pixels in which the gradient is longest. A warp is bilinear between GRID x GRID points.

Source: Moosavi-Dezfooli et al., "Universal adversarial perturbations" (2017), for the idea; warps: Xiao et al.,
"Spatially Transformed Adversarial Examples" (2018), for single images.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aft_jax.adversarial import Logits, direction, project, random_in_ball
from aft_jax.sampling import sample_bilinear

Kind = Literal['linf', 'l2', 'sparse', 'warp']
KINDS: tuple[Kind, ...] = ('linf', 'l2', 'sparse', 'warp')
GRID = 7
STEP = 0.25


class Universal(NamedTuple):
    """A kind of change, and how large it may be (see above; of 'sparse', pixels in each step)."""

    kind: Kind
    size: float


class Change(NamedTuple):
    """One change.

    Attributes:
        values: linf and l2: what is added, [1, H, W, C]. sparse: what pixels become, likewise. warp: rows and columns
            by which the places of the grid are shifted, in pixels, [1, GRID, GRID, 2].
        chosen: sparse: 1 in the pixels that are set, [1, H, W, 1]; else 1.
    """

    values: jax.Array
    chosen: jax.Array


def start(universal: Universal, key: jax.Array, image_shape: tuple[int, ...]) -> Change:
    """Returns a random change, or (sparse) none yet.

    Args:
        universal: Of which kind.
        key: PRNG key.
        image_shape: (H, W, C).
    """
    shape, one = (1, *image_shape), jnp.ones((), jnp.float32)
    match universal.kind:
        case 'linf' | 'l2':
            return Change(random_in_ball(key, shape, universal.size, universal.kind), one)
        case 'sparse':
            return Change(jnp.zeros(shape, jnp.float32), jnp.zeros((*shape[:3], 1), jnp.float32))
        case 'warp':
            size = universal.size
            return Change(jax.random.uniform(key, (1, GRID, GRID, 2), jnp.float32, -size, size), one)


def apply(universal: Universal, change: Change, images: jax.Array) -> jax.Array:
    """Returns the images [B, H, W, C], float32 in [0, 1], with the change in each of them."""
    match universal.kind:
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


def advance(universal: Universal, change: Change, gradient: jax.Array) -> Change:
    """Returns the change one step further up the loss.

    Args:
        universal: Of which kind.
        change: Before the step.
        gradient: Of the loss, in the shape of `change.values`.
    """
    size, values = universal.size, change.values
    match universal.kind:
        case 'linf' | 'l2':
            moved = values + STEP * size * direction(gradient, universal.kind)
            return change._replace(values=project(moved, size, universal.kind))
        case 'sparse':
            free = jnp.abs(gradient).sum(axis=-1) * (1 - change.chosen[..., 0])
            _, longest = jax.lax.top_k(free.reshape(-1), int(size))
            new = jnp.zeros(free.size, jnp.float32).at[longest].set(1.0).reshape(change.chosen.shape)
            wanted = (gradient > 0).astype(jnp.float32)
            return Change(jnp.where(new > 0, wanted, values), change.chosen + new)
        case 'warp':
            return change._replace(values=jnp.clip(values + STEP * size * jnp.sign(gradient), -size, size))


def perturb_together(
    logits: Logits,
    images: jax.Array,
    labels: jax.Array,
    universals: tuple[Universal, ...],
    changes: tuple[Change, ...],
    steps: int,
) -> tuple[jax.Array, tuple[Change, ...]]:
    """Returns universal adversarial examples, an equal part of the images by each kind, and the changes.

    Args:
        logits: Classifier in evaluation mode, float32 [B, H, W, C] -> float32 [B, K].
        images: float32 [B, H, W, C] in [0, 1].
        labels: int32 [B], true.
        universals: The kinds.
        changes: One of each, to begin with.
        steps: How many steps all of them take.

    Returns:
        float32 [B, H, W, C], the images of the first kind first, and the changes after the last step.
    """
    ends = [len(labels) * i // len(universals) for i in range(len(universals) + 1)]
    parts = [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]

    def examples(values: tuple[jax.Array, ...]) -> jax.Array:
        made = [
            apply(universal, change._replace(values=value), images[part])
            for universal, change, value, part in zip(universals, changes, values, parts, strict=True)
        ]
        return jnp.concatenate(made)

    def loss(values: tuple[jax.Array, ...]) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(examples(values)), labels).sum()

    def of(changes: tuple[Change, ...]) -> tuple[jax.Array, ...]:
        return tuple(change.values for change in changes)

    for _ in range(steps):
        gradients = jax.grad(loss)(of(changes))
        changes = tuple(advance(*three) for three in zip(universals, changes, gradients, strict=True))
    return examples(of(changes)), changes


def _between_points(length: int) -> np.ndarray:
    """float32 [length, GRID]: what each point of a line gives to each pixel, the ends meeting the ends."""
    positions = np.linspace(0, GRID - 1, length)
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(GRID)[None])).astype(np.float32)
