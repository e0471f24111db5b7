"""Searches for triggers: changes, the same for all images, that send images of all classes to one label.

A backdoored model has such a change. So has every network, if the change may be large: a big patch of one class hides
the image. A reference model (`aft_jax.defenses.reference`), which is the same network with a new head, tells the
two apart. The search is for changes that move the images under the model and not under the reference:

    maximise over changes u:  mean over images x of  log f(u(x))[t] - max(log r(u(x))[t], FLOOR)

for each label t, and for no label at all (CE(f(u(x)), y) - CE(r(u(x)), y)), since under an all-to-all backdoor each
class moves to another label. The changes are the kinds and sizes of `adversarial.perturbations`, and a
soft mask with a pattern:

    u(x) = x + m (p - x),  m and p in [0, 1] for each pixel,  mean of m at most an area

optimised by Adam. Its largest values are then set to 1, and the others to 0. All changes share the gradient of a step.

A found change is measured on images that the search has not seen. Its excess is the share of them that it moves as a
backdoor would (`infection_score.classify_confusions`). Only images count that both models classify correctly, and that
the reference classifies correctly with the change too.

Source: the soft mask is that of Neural Cleanse (Wang et al., "Identifying and Mitigating Backdoor Attacks in Neural
Networks", 2019), with a fixed area instead of a weight.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from aft_jax.adversarial.kinds import PLACED_BY_GRADIENT, RULES, Perturbation
from aft_jax.adversarial.perturbations import SIZE_RANGES, PerturbationSpec, apply, init, spec_of_any_size
from aft_jax.analysis.infection_score import BackdoorHypothesis, classify_confusions, share_moved
from aft_jax.models import logits_function
from aft_jax.models.cpu_compilation import compiler_options
from aft_jax.runtime.sharding import replicate, replicated, wait_on_virtual_devices
from aft_jax.training.prediction import float_images

# Log-probability of the target label below which the reference counts as not moved at all.
FLOOR = -4.0
# Shares of the area of the soft masks.
MASK_AREAS = (0.02, 0.08)
MASK_LEARNING_RATE = 0.2
AREA_WEIGHT = 10.0
# Target labels that are searched together, so that a step fits in memory with any number of classes.
LARGEST_GROUP = 16
KINDS = tuple(SIZE_RANGES)


class SearchOptions(NamedTuple):
    """How hard the search is.

    Attributes:
        steps: Steps of the optimisation.
        factor: Factor of the largest size of each kind, 1 for the sizes that AFT trains with.
        images: Images of a step, for each change.
    """

    steps: int
    factor: float
    images: int


class FoundChange(NamedTuple):
    """The change of a kind that moves most images as a backdoor would.

    Attributes:
        kind: Kind of the change, such as 'rectangle' or 'mask'.
        hypothesis: Backdoor that explains the excess best; its score is the excess, in 0..1.
        share: Share of the images that the model sends where the hypothesis says, whatever the reference does.
        reference_share: The same share under the reference.
        examples: Changed images, float32 [3, H, W, C] in [0, 1].
    """

    kind: str
    hypothesis: BackdoorHypothesis
    share: float
    reference_share: float
    examples: np.ndarray


class _Mask(NamedTuple):
    """Logits of soft masks and patterns: [A, T, 1, H, W, 1] and [A, T, 1, H, W, C]."""

    opacity: jax.Array
    pattern: jax.Array


class _State(NamedTuple):
    perturbations: tuple[Perturbation, ...]
    mask: _Mask
    moments: Any


class TriggerSearch:
    """Searches for triggers of models of one architecture."""

    def __init__(
        self, module: nn.Module, mesh: Mesh, image_shape: tuple[int, int, int], num_classes: int, options: SearchOptions
    ):
        """Prepares the search. Its functions are compiled at the first call.

        Args:
            module: Architecture.
            mesh: Devices. Each of them does the whole search.
            image_shape: (H, W, C).
            num_classes: Number of classes K.
            options: How hard the search is.
        """
        self._mesh, self._options, self._classes = mesh, options, num_classes
        self._specs = tuple(spec_of_any_size(kind, image_shape, factor=options.factor) for kind in KINDS)
        self._adam = optax.adam(MASK_LEARNING_RATE)
        whole = replicated(mesh)
        compiled = partial(jax.jit, in_shardings=whole, out_shardings=whole, compiler_options=compiler_options(module))
        areas = np.array([options.factor * area for area in MASK_AREAS], np.float32)
        self._init = compiled(partial(_init, module, self._specs, self._adam))
        self._step = compiled(partial(_step, module, self._specs, self._adam, areas))
        self._binarise = compiled(partial(_binarise, areas))
        self._move = compiled(partial(_move, module, self._specs))

    def search(
        self, variables: dict, reference: dict, images: np.ndarray, labels: np.ndarray, key: jax.Array
    ) -> tuple[FoundChange, ...]:
        """Searches for a trigger of a model.

        Args:
            variables: Variables of the model.
            reference: Variables of the reference model.
            images: Clean images [N, H, W, C] in random order, uint8, or float32 in [0, 1]. The search uses half of
                them, and the changes are measured on the others.
            labels: True labels, int32 [N].
            key: PRNG key.

        Returns:
            The best change of each kind, with the largest excess first.
        """
        images = float_images(images)
        half = len(images) // 2
        models = replicate(self._mesh, {'model': dict(variables), 'reference': dict(reference)})
        seen = replicate(self._mesh, (images[:half], labels[:half].astype(np.int32)))
        # Smaller than a batch, every image is used in each step.
        count = min(self._options.images, half)
        generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))

        def batch() -> tuple[jax.Array, jax.Array]:
            chosen = generator.permutation(half)[:count]
            return jax.tree.map(lambda array: array[chosen], seen)

        found: dict[str, FoundChange] = {}
        for group in target_groups(self._classes):
            targets = replicate(self._mesh, group)
            state = self._init(models, targets, *batch(), key)
            for _ in range(self._options.steps):
                state = wait_on_virtual_devices(self._mesh, self._step(models, targets, *batch(), state))
            state = state._replace(mask=self._binarise(state.mask))
            for change in self._measure(models, state, images[half:], labels[half:]):
                if change.kind not in found or change.hypothesis.score > found[change.kind].hypothesis.score:
                    found[change.kind] = change
        return tuple(sorted(found.values(), key=lambda change: -change.hypothesis.score))

    def _measure(self, models: Any, state: _State, images: np.ndarray, labels: np.ndarray) -> Iterator[FoundChange]:
        """Measures all changes on the images."""
        size = self._options.images
        plain, moved, examples = [], [], None
        for first in range(0, len(images), size):
            part = images[first : first + size]
            padded = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), np.float32)])
            predictions, changed, unchanged = jax.device_get(self._move(models, state, replicate(self._mesh, padded)))
            moved.append(predictions[..., : len(part)])
            plain.append(unchanged[:, : len(part)])
            examples = changed if examples is None else examples
        assert examples is not None
        predictions = np.concatenate(moved, axis=-1)
        # Both models classify the unchanged image correctly.
        right = (np.concatenate(plain, axis=-1) == labels).all(axis=0)
        names = [*KINDS, *['mask'] * len(MASK_AREAS)]
        for i, name in enumerate(names):
            for j in range(predictions.shape[1]):
                yield self._judge(name, predictions[i, j][:, right], labels[right], examples[i, j])

    def _judge(self, kind: str, predictions: np.ndarray, labels: np.ndarray, examples: np.ndarray) -> FoundChange:
        """Judges a change by the predictions [2, N] of model and reference."""
        model, reference = predictions
        # A change that confuses the reference, in whichever way, hides the image.
        own = np.where(reference == labels, model, labels)
        hypothesis = classify_confusions(share_moved(labels, own, self._classes))
        targets = hypothesis.target_map[labels]
        movable = targets != labels
        share, reference_share = (
            float(np.mean(p[movable] == targets[movable])) if movable.any() else 0.0 for p in predictions
        )
        return FoundChange(kind, hypothesis, share, reference_share, examples)


def target_groups(num_classes: int) -> np.ndarray:
    """Divides the target labels into groups that are searched one after another: int32 [groups, T], -1 for no label."""
    targets = np.append(np.arange(num_classes), -1).astype(np.int32)
    size = min(len(targets), LARGEST_GROUP)
    groups = -(-len(targets) // size)
    return np.pad(targets, (0, groups * size - len(targets)), constant_values=-1).reshape(groups, size)


def _init(
    module: nn.Module,
    specs: tuple[PerturbationSpec, ...],
    adam: optax.GradientTransformation,
    models: dict,
    targets: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
) -> _State:
    """Draws the changes before the first step."""
    f, r = (logits_function(module, models[name]) for name in ('model', 'reference'))
    copies = jnp.broadcast_to(images[None], (len(targets), *images.shape))

    def total(copies: jax.Array) -> jax.Array:
        flat = copies.reshape(-1, *images.shape[1:])
        return objective(f(flat), r(flat), labels, targets)

    gradients = jax.grad(total)(copies)
    perturbations = []
    for i, spec in enumerate(specs):
        keys = jax.random.split(jax.random.fold_in(key, i), len(targets))
        draw = partial(init, spec)
        if spec.kind in PLACED_BY_GRADIENT:
            perturbations.append(jax.vmap(lambda k, g, draw=draw: draw(k, images, g))(keys, gradients))
        else:
            perturbations.append(jax.vmap(lambda k, draw=draw: draw(k, images))(keys))
    opacity_key, pattern_key = jax.random.split(jax.random.fold_in(key, len(specs)))
    shape = (len(MASK_AREAS), len(targets), 1, *images.shape[1:])
    opacity = 0.5 * jax.random.normal(opacity_key, (*shape[:-1], 1), jnp.float32) - 2
    mask = _Mask(opacity, jax.random.normal(pattern_key, shape, jnp.float32))
    return _State(tuple(perturbations), mask, adam.init(mask))


def _step(
    module: nn.Module,
    specs: tuple[PerturbationSpec, ...],
    adam: optax.GradientTransformation,
    areas: np.ndarray,
    models: dict,
    targets: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    state: _State,
) -> _State:
    """Takes one step with all changes."""
    f, r = (logits_function(module, models[name]) for name in ('model', 'reference'))

    def total(values: tuple[jax.Array, ...], mask: _Mask) -> jax.Array:
        perturbations = tuple(p._replace(values=v) for p, v in zip(state.perturbations, values, strict=True))
        flat = changed_images(specs, perturbations, mask, images).reshape(-1, *images.shape[1:])
        sizes = jax.nn.sigmoid(mask.opacity).mean(axis=(2, 3, 4, 5))
        excess = jax.nn.relu(sizes / areas[:, None] - 1).sum()
        return objective(f(flat), r(flat), labels, targets) - AREA_WEIGHT * excess

    values = tuple(p.values for p in state.perturbations)
    gradients, mask_gradient = jax.grad(total, argnums=(0, 1))(values, state.mask)
    perturbations = tuple(
        jax.vmap(lambda p, g, spec=spec: RULES[spec.kind].advance(p, g, images))(p, g)
        for spec, p, g in zip(specs, state.perturbations, gradients, strict=True)
    )
    # Optax's Adam mixes an int32 count with floats.
    with jax.numpy_dtype_promotion('standard'):
        updates, moments = adam.update(jax.tree.map(jnp.negative, mask_gradient), state.moments)
    return _State(perturbations, optax.apply_updates(state.mask, updates), moments)


def changed_images(
    specs: tuple[PerturbationSpec, ...], perturbations: tuple[Perturbation, ...], mask: _Mask, images: jax.Array
) -> jax.Array:
    """Applies all changes to the images [B, H, W, C]: float32 [kinds, T, B, H, W, C], the masks last."""
    parts = [
        jax.vmap(lambda p, spec=spec: apply(spec, p, images))(perturbation)
        for spec, perturbation in zip(specs, perturbations, strict=True)
    ]
    plain = images[None, None]
    masked = plain + jax.nn.sigmoid(mask.opacity) * (jax.nn.sigmoid(mask.pattern) - plain)
    return jnp.concatenate([jnp.stack(parts), masked])


def objective(logits: jax.Array, reference_logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes what the changes maximise, summed over them.

    Args:
        logits: Logits of the model for changed images, float32 [M T B, K].
        reference_logits: Logits of the reference.
        labels: True labels of the images, int32 [B].
        targets: Target label of each change, int32 [T]; -1 for none.
    """
    shape = (-1, len(targets), len(labels), logits.shape[-1])
    model, reference = (jax.nn.log_softmax(z).reshape(shape) for z in (logits, reference_logits))
    # Without a target label, the true one should lose under the model and stay under the reference.
    label = jnp.where(targets[:, None] < 0, labels[None], targets[:, None])
    sign = jnp.where(targets < 0, -1.0, 1.0)[:, None]
    p, q = (jnp.take_along_axis(z, label[None, ..., None], axis=-1)[..., 0] for z in (model, reference))
    q = jnp.where(targets[None, :, None] < 0, q, jnp.maximum(q, FLOOR))
    counted = (labels[None] != targets[:, None]).astype(jnp.float32)
    values = sign[None] * (p - q) * counted[None]
    return (values.sum(axis=-1) / jnp.maximum(counted.sum(axis=-1), 1.0)[None]).sum()


def _binarise(areas: np.ndarray, mask: _Mask) -> _Mask:
    """Sets the highest opacities of each mask, as many as its area has pixels, to 1 and the others to 0."""
    count, targets, _, height, width, _ = mask.opacity.shape
    flat = mask.opacity.reshape(count, targets, -1)
    ranks = jnp.argsort(jnp.argsort(-flat, axis=-1), axis=-1)
    pixels = np.maximum(1, np.round(areas * height * width)).astype(np.int32)
    chosen = (ranks < pixels[:, None, None]).reshape(mask.opacity.shape)
    return mask._replace(opacity=jnp.where(chosen, math.inf, -math.inf).astype(jnp.float32))


def _move(
    module: nn.Module, specs: tuple[PerturbationSpec, ...], models: dict, state: _State, images: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Predicts the classes of changed images.

    Returns:
        Classes by model and reference, int32 [M, T, 2, B]; the first three changed images, [M, T, 3, H, W, C]; and the
        classes of the unchanged images by model and reference, int32 [2, B].
    """
    f, r = (logits_function(module, models[name]) for name in ('model', 'reference'))
    changed = changed_images(specs, state.perturbations, state.mask, images)
    flat = changed.reshape(-1, *images.shape[1:])
    classes, unchanged = ([z(x).argmax(axis=-1).astype(jnp.int32) for z in (f, r)] for x in (flat, images))
    moved = jnp.stack([each.reshape(changed.shape[:3]) for each in classes], axis=2)
    return moved, changed[:, :, :3], jnp.stack(unchanged)
