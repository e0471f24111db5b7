"""Searches for triggers: changes, the same for all images, that send images of all classes to one label.

A backdoored model has such a change. So has every network, if the change may be large: a big patch of one class hides
the image. A reference model (`aft_jax.defenses.reference`), which is the same network with a new head, tells the
two apart. The search is for changes that move the images under the model and not under the reference:

    maximise over changes u:  mean over images x of  log f(u(x))[t] - max(log r(u(x))[t], FLOOR)

for each label t, and for no label at all (CE(f(u(x)), y) - CE(r(u(x)), y)), since under an all-to-all backdoor each
class moves to another label. `searched_changes` has the changes. After a part of the steps, each kind of change keeps
only the labels with the largest objectives.

A found change is measured on images that the search has not seen. Its excess is the share of them that it moves as a
backdoor would (`infection_score.classify_confusions`). Only images count that both models classify correctly, and that
the reference classifies correctly with the change too.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from aft_jax.adversarial.perturbations import SIZE_RANGES, spec_of_any_size
from aft_jax.analysis import searched_changes
from aft_jax.analysis.infection_score import BackdoorHypothesis, classify_confusions, share_moved
from aft_jax.analysis.searched_changes import NO_TARGET, Changes, Kinds
from aft_jax.models.cpu_compilation import compiler_options
from aft_jax.runtime.sharding import replicate, replicated, wait_on_virtual_devices
from aft_jax.training.prediction import float_images

# Shares of the area of the soft masks.
MASK_AREAS = (0.02, 0.08)
# Share of the steps that all target labels get, and the number of labels that each change then keeps.
FIRST_SHARE, KEPT_LABELS = 0.25, 3
# Target labels that are searched together. The size is that of the kept ones, so that one compiled step does for all.
GROUP = KEPT_LABELS + 1
KINDS = tuple(SIZE_RANGES)


class SearchOptions(NamedTuple):
    """How hard the search is.

    Attributes:
        steps: Steps of the optimisation.
        factor: Size of the changes of a purified model, in multiples of the largest that AFT trains with.
        factor_before: The same for a model that was not purified. Smaller changes tell better whether it is infected,
            since large ones command every model.
        images: Images of a step, for each change.
    """

    steps: int
    factor: float
    factor_before: float
    images: int

    def factor_for(self, purified: bool) -> float:
        """Returns the factor for a model."""
        return self.factor if purified else self.factor_before


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


class TriggerSearch:
    """Searches for triggers of models of one architecture."""

    def __init__(
        self,
        module: nn.Module,
        mesh: Mesh,
        image_shape: tuple[int, int, int],
        num_classes: int,
        options: SearchOptions,
        *,
        purified: bool,
    ):
        """Prepares the search. Its functions are compiled at the first call.

        Args:
            module: Architecture.
            mesh: Devices. Each of them does the whole search.
            image_shape: (H, W, C).
            num_classes: Number of classes K.
            options: How hard the search is.
            purified: Whether the models were purified.
        """
        self._mesh, self._options, self._classes = mesh, options, num_classes
        factor = options.factor_for(purified)
        # A random size would favour the labels that draw a large one.
        specs = tuple(spec_of_any_size(kind, image_shape, factor=factor)._replace(smallest=0.0) for kind in KINDS)
        self._kinds = kinds = Kinds(specs, tuple(factor * area for area in MASK_AREAS))
        whole = replicated(mesh)
        compiled = partial(jax.jit, in_shardings=whole, out_shardings=whole, compiler_options=compiler_options(module))
        self._init = compiled(partial(searched_changes.init_changes, module, kinds))
        self._step = compiled(partial(searched_changes.step_changes, module, kinds))
        self._binarise = compiled(partial(searched_changes.binarise, kinds))
        self._classify = compiled(partial(searched_changes.classify_changed, module, kinds))

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
        orders = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        chosen = [orders.permutation(half)[:count] for _ in range(self._options.steps)]

        def take_steps(changes: Changes, steps: slice) -> Changes:
            for indices in chosen[steps]:
                batch = jax.tree.map(lambda array, i=indices: array[i], seen)
                changes = wait_on_virtual_devices(self._mesh, self._step(models, *batch, changes))
            return changes

        first = round(FIRST_SHARE * self._options.steps)
        groups: list[Changes] = []
        for i, targets in enumerate(target_groups(self._classes)):
            batch = jax.tree.map(lambda array: array[:count], seen)
            changes = self._init(models, replicate(self._mesh, targets), *batch, jax.random.fold_in(key, i))
            groups.append(jax.device_get(take_steps(changes, slice(first))))
            groups = [searched_changes.best_changes(groups, KEPT_LABELS)]
        changes = take_steps(replicate(self._mesh, groups[0]), slice(first, None))
        found: dict[str, FoundChange] = {}
        for change in self._measure(models, self._binarise(changes), images[half:], labels[half:]):
            if change.kind not in found or change.hypothesis.score > found[change.kind].hypothesis.score:
                found[change.kind] = change
        return tuple(sorted(found.values(), key=lambda change: -change.hypothesis.score))

    def _measure(self, models: Any, changes: Changes, images: np.ndarray, labels: np.ndarray) -> Iterator[FoundChange]:
        """Measures all changes on the images."""
        size = self._options.images
        plain, moved, examples = [], [], None
        for first in range(0, len(images), size):
            part = images[first : first + size]
            padded = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), np.float32)])
            predictions, changed, unchanged = jax.device_get(
                self._classify(models, replicate(self._mesh, padded), changes)
            )
            moved.append(predictions[..., : len(part)])
            plain.append(unchanged[:, : len(part)])
            examples = changed if examples is None else examples
        assert examples is not None
        predictions = np.concatenate(moved, axis=-1)
        # Both models classify the unchanged image correctly.
        right = (np.concatenate(plain, axis=-1) == labels).all(axis=0)
        for i, name in enumerate(self._kinds.names):
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
    """Divides the target labels into groups, searched one after another: int32 [groups, T], NO_TARGET for none."""
    targets = np.append(np.arange(num_classes), NO_TARGET).astype(np.int32)
    size = min(len(targets), GROUP)
    groups = -(-len(targets) // size)
    return np.pad(targets, (0, groups * size - len(targets)), constant_values=NO_TARGET).reshape(groups, size)
