"""The changes of images that a search for triggers optimises: how they start, take steps, and are chosen.

Each of T target labels has M changes: one for each kind of `adversarial.perturbations`, and a soft mask with a pattern
for each of several areas:

    u(x) = x + m (p - x),  m and p in [0, 1] for each pixel,  mean of m at most the area

The masks are optimised by Adam, the others by the steps of their kind. All changes share the gradient of a step.

Source: the soft mask is that of Neural Cleanse (Wang et al., "Identifying and Mitigating Backdoor Attacks in Neural
Networks", 2019), with a fixed area instead of a weight.
"""

import math
from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from aft_jax.adversarial.kinds import PLACED_BY_GRADIENT, RULES, Perturbation
from aft_jax.adversarial.perturbations import PerturbationSpec, apply, init
from aft_jax.adversarial.pgd import Logits
from aft_jax.models import logits_function

# Label of a change that has no target label.
NO_TARGET = -1
# Log-probability of the target label below which the reference counts as not moved at all.
FLOOR = -4.0
AREA_WEIGHT = 10.0
MASK_ADAM = optax.adam(0.2)


class SoftMask(NamedTuple):
    """A soft mask and a pattern for each target label. The first axis of each leaf is T.

    Attributes:
        opacity: Logits of m, float32 [T, 1, H, W, 1].
        pattern: Logits of p, float32 [T, 1, H, W, C].
        moments: State of Adam.
    """

    opacity: jax.Array
    pattern: jax.Array
    moments: Any


class Changes(NamedTuple):
    """M changes for each of T target labels.

    Attributes:
        targets: Target label of each change, int32 [M, T]; NO_TARGET for none.
        values: Moving average of each objective, float32 [M, T]. Each step counts half as much as the next one.
        parts: State of each of the M changes, a perturbation or a mask. The first axis of each leaf is T.
    """

    targets: jax.Array
    values: jax.Array
    parts: tuple[Perturbation | SoftMask, ...]


class Kinds(NamedTuple):
    """The M changes: first the perturbations of each spec, then a mask of each area (share of the pixels)."""

    specs: tuple[PerturbationSpec, ...]
    areas: tuple[float, ...]

    @property
    def names(self) -> list[str]:
        """Name of each change, such as 'rectangle' or 'mask'."""
        return [*(spec.kind for spec in self.specs), *(['mask'] * len(self.areas))]


def init_changes(
    module: nn.Module,
    kinds: Kinds,
    models: dict,
    targets: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
) -> Changes:
    """Draws the changes before the first step.

    Args:
        module: Architecture.
        kinds: The M changes.
        models: Variables of 'model' and of 'reference'.
        targets: Target labels, int32 [T]; NO_TARGET for none.
        images: Clean images, float32 [B, H, W, C].
        labels: True labels, int32 [B].
        key: PRNG key.
    """
    model, reference = _logits(module, models)
    copies = jnp.broadcast_to(images[None], (len(targets), *images.shape))

    def total(copies: jax.Array) -> jax.Array:
        flat = copies.reshape(-1, *images.shape[1:])
        return objectives(model(flat), reference(flat), labels, targets[None]).sum()

    gradients = jax.grad(total)(copies)
    parts: list[Perturbation | SoftMask] = []
    for i, spec in enumerate(kinds.specs):
        keys = jax.random.split(jax.random.fold_in(key, i), len(targets))
        draw = partial(init, spec)
        if spec.kind in PLACED_BY_GRADIENT:
            parts.append(jax.vmap(lambda k, g, draw=draw: draw(k, images, g))(keys, gradients))
        else:
            parts.append(jax.vmap(lambda k, draw=draw: draw(k, images))(keys))
    for i in range(len(kinds.areas)):
        opacity_key, pattern_key = jax.random.split(jax.random.fold_in(key, len(kinds.specs) + i))
        shape = (len(targets), 1, *images.shape[1:])
        opacity = 0.5 * jax.random.normal(opacity_key, (*shape[:-1], 1), jnp.float32) - 2
        pattern = jax.random.normal(pattern_key, shape, jnp.float32)
        parts.append(SoftMask(opacity, pattern, jax.vmap(MASK_ADAM.init)((opacity, pattern))))
    each = jnp.broadcast_to(targets[None], (len(parts), len(targets)))
    return Changes(each, jnp.zeros(each.shape, jnp.float32), tuple(parts))


def step_changes(
    module: nn.Module, kinds: Kinds, models: dict, images: jax.Array, labels: jax.Array, changes: Changes
) -> Changes:
    """Takes one step with all changes. The arguments are those of `init_changes`."""
    model, reference = _logits(module, models)

    def total(values: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        moved = changes._replace(parts=tuple(map(_with_values, changes.parts, values)))
        flat = changed_images(kinds, moved, images).reshape(-1, *images.shape[1:])
        each = objectives(model(flat), reference(flat), labels, changes.targets)
        return each.sum() - AREA_WEIGHT * _excess_area(kinds, moved), each

    gradients, each = jax.grad(total, has_aux=True)(tuple(map(_values, changes.parts)))
    parts: list[Perturbation | SoftMask] = []
    for i, (part, gradient) in enumerate(zip(changes.parts, gradients, strict=True)):
        if isinstance(part, SoftMask):
            parts.append(_advance_mask(part, gradient))
        else:
            advance = RULES[kinds.specs[i].kind].advance
            parts.append(jax.vmap(lambda p, g, advance=advance: advance(p, g, images))(part, gradient))
    return Changes(changes.targets, (changes.values + each) / 2, tuple(parts))


def _logits(module: nn.Module, models: dict) -> tuple[Logits, Logits]:
    return logits_function(module, models['model']), logits_function(module, models['reference'])


def _values(part: Perturbation | SoftMask) -> Any:
    """Returns the arrays of a change that the search optimises."""
    return (part.opacity, part.pattern) if isinstance(part, SoftMask) else part.values


def _with_values(part: Perturbation | SoftMask, values: Any) -> Perturbation | SoftMask:
    if isinstance(part, SoftMask):
        return part._replace(opacity=values[0], pattern=values[1])
    return part._replace(values=values)


def _excess_area(kinds: Kinds, changes: Changes) -> jax.Array:
    """Computes by which share the masks are larger than their areas, summed over them."""
    masks = [part for part in changes.parts if isinstance(part, SoftMask)]
    sizes = jnp.stack([jax.nn.sigmoid(mask.opacity).mean(axis=(1, 2, 3, 4)) for mask in masks])
    return jax.nn.relu(sizes / np.array(kinds.areas, np.float32)[:, None] - 1).sum()


def _advance_mask(mask: SoftMask, gradient: Any) -> SoftMask:
    # Optax's Adam mixes an int32 count with floats.
    with jax.numpy_dtype_promotion('standard'):
        updates, moments = jax.vmap(MASK_ADAM.update)(jax.tree.map(jnp.negative, gradient), mask.moments)
    return SoftMask(mask.opacity + updates[0], mask.pattern + updates[1], moments)


def changed_images(kinds: Kinds, changes: Changes, images: jax.Array) -> jax.Array:
    """Applies all changes to the images [B, H, W, C]: float32 [M, T, B, H, W, C]."""
    changed = []
    for i, part in enumerate(changes.parts):
        if isinstance(part, SoftMask):
            changed.append(images[None] + jax.nn.sigmoid(part.opacity) * (jax.nn.sigmoid(part.pattern) - images[None]))
        else:
            changed.append(jax.vmap(lambda p, spec=kinds.specs[i]: apply(spec, p, images))(part))
    return jnp.stack(changed)


def objectives(logits: jax.Array, reference_logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes what the search maximises for each change, float32 [M, T].

    Args:
        logits: Logits of the model for changed images, float32 [M T B, K].
        reference_logits: Logits of the reference.
        labels: True labels of the images, int32 [B].
        targets: Target label of each change, int32 [M, T]; NO_TARGET for none.
    """
    shape = (*targets.shape, len(labels), logits.shape[-1])
    model, reference = (jax.nn.log_softmax(z).reshape(shape) for z in (logits, reference_logits))
    free = targets[..., None] == NO_TARGET
    # Without a target label, the true one should lose under the model and stay under the reference.
    label = jnp.where(free, labels[None, None], targets[..., None])
    p, q = (jnp.take_along_axis(z, label[..., None], axis=-1)[..., 0] for z in (model, reference))
    q = jnp.where(free, q, jnp.maximum(q, FLOOR))
    counted = (labels[None, None] != targets[..., None]).astype(jnp.float32)
    sums = (jnp.where(free, q - p, p - q) * counted).sum(axis=-1)
    return sums / jnp.maximum(counted.sum(axis=-1), 1.0)


def best_changes(groups: list[Changes], count: int) -> Changes:
    """Keeps the target labels with the largest objectives of each change, and one change without a target label.

    Args:
        groups: Changes of the same kinds for different target labels, on the host.
        count: Number of target labels that each change keeps, if there are as many.
    """
    targets, values = (np.concatenate([group[i] for group in groups], axis=1) for i in (0, 1))
    free = targets == NO_TARGET
    count = min(count, int((~free[0]).sum()))
    ranked = np.argsort(np.where(free, -np.inf, values), axis=1)[:, ::-1][:, :count]
    best_free = np.argmax(np.where(free, values, -np.inf), axis=1)
    chosen = np.concatenate([ranked, best_free[:, None]], axis=1)

    def choose(kept: np.ndarray, *leaves: np.ndarray) -> np.ndarray:
        return np.concatenate(leaves)[kept]

    states = zip(*(group.parts for group in groups), strict=True)
    parts = tuple(jax.tree.map(partial(choose, kept), *each) for kept, each in zip(chosen, states, strict=True))
    kept_targets, kept_values = (np.take_along_axis(each, chosen, axis=1) for each in (targets, values))
    return Changes(cast(Any, kept_targets), cast(Any, kept_values), parts)


def binarise(kinds: Kinds, changes: Changes) -> Changes:
    """Sets the highest opacities of each mask, as many as its area has pixels, to 1 and the others to 0."""
    parts = list(changes.parts)
    for i, area in enumerate(kinds.areas, len(kinds.specs)):
        mask = parts[i]
        assert isinstance(mask, SoftMask)
        targets, _, height, width, _ = mask.opacity.shape
        ranks = jnp.argsort(jnp.argsort(-mask.opacity.reshape(targets, -1), axis=-1), axis=-1)
        chosen = (ranks < max(1, round(area * height * width))).reshape(mask.opacity.shape)
        parts[i] = mask._replace(opacity=jnp.where(chosen, math.inf, -math.inf).astype(jnp.float32))
    return changes._replace(parts=tuple(parts))


def classify_changed(
    module: nn.Module, kinds: Kinds, models: dict, images: jax.Array, changes: Changes
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Predicts the classes of changed images.

    Returns:
        Classes by model and reference, int32 [M, T, 2, B]; the first three changed images, [M, T, 3, H, W, C]; and the
        classes of the unchanged images by model and reference, int32 [2, B].
    """
    logits = _logits(module, models)
    changed = changed_images(kinds, changes, images)
    flat = changed.reshape(-1, *images.shape[1:])
    classes, unchanged = ([z(x).argmax(axis=-1).astype(jnp.int32) for z in logits] for x in (flat, images))
    moved = jnp.stack([each.reshape(changed.shape[:3]) for each in classes], axis=2)
    return moved, changed[:, :, :3], jnp.stack(unchanged)
