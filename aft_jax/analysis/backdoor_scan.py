"""Scans models for a backdoor with clean images alone.

A scan has three parts: the infection score, the landing of adversarial examples, and a search for triggers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from aft_jax.analysis.infection_score import ONE, InfectionScore, Scorer
from aft_jax.analysis.probe import ModelProbe
from aft_jax.analysis.trigger_search import FoundChange, SearchOptions, TriggerSearch
from aft_jax.data.dataset import Dataset
from aft_jax.randomness import generator_for, key_for

# Images per class that a meaningful score needs.
MIN_IMAGES_PER_CLASS = 20
# More images per class only cost time.
MAX_IMAGES_PER_CLASS = 50
# Excess of a found change of each kind, above which a model counts as infected, and a purified one as not erased. Some
# changes also work on benign models. PROVISIONAL: see docs/results/random_triggers.
LIMITS = {'linf': 0.68, 'l2': 0.88, 'mask': 0.72, 'low_frequency': 0.42}
OTHER_LIMIT = 0.35
PURIFIED_LIMITS = {'linf': 0.65, 'l2': 0.6, 'mask': 0.55, 'rectangle': 0.6, 'region': 0.6, 'low_frequency': 0.4}
OTHER_PURIFIED_LIMIT = 0.3
INFECTED, NOT_ERASED, NOTHING_FOUND = 'infected', 'not erased', 'nothing found'


class ScanImages(NamedTuple):
    """Clean images for a scan.

    Attributes:
        images: Clean images in random order, uint8 [N, H, W, C].
        labels: True labels, int32 [N].
        num_classes: Number of classes K.
        held_out: Whether no defense trains on any of the images.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    held_out: bool


def choose_scan_images(dataset: Dataset, clean: np.ndarray, seed: int) -> ScanImages:
    """Chooses the images for the scan of an experiment.

    The images are the held-out ones, which no defense trains on, if there are enough. Otherwise they are all clean
    images.

    Args:
        dataset: Data set; its test images are the held-out ones.
        clean: Indices of the training images that the defender has, int.
        seed: Seed of the experiment.
    """
    held_out = len(dataset.test_labels) >= MIN_IMAGES_PER_CLASS * dataset.num_classes
    images, labels = dataset.test_images, dataset.test_labels
    if not held_out:
        images = np.concatenate([images, dataset.train_images[clean]])
        labels = np.concatenate([labels, dataset.train_labels[clean]])
    # Stored images may be sorted by class, and the score splits the images in halves.
    order = generator_for(seed, 'scan').permutation(len(labels))
    chosen = order[: MAX_IMAGES_PER_CLASS * dataset.num_classes]
    return ScanImages(images[chosen], labels[chosen], dataset.num_classes, held_out)


class Scan(NamedTuple):
    """Result of a scan.

    Attributes:
        fields: Plain values for results.json: those of `scan_fields`, and 'search' with those of `search_fields`.
        changes: Changes that the search found, for pictures.
    """

    fields: dict[str, Any]
    changes: tuple[FoundChange, ...]


class ScanInputs(NamedTuple):
    """What the scans of all models of an experiment share.

    Attributes:
        images: Images that all models are scanned on.
        reference: Variables of the reference model, for the search.
        seed: Seed of the experiment.
    """

    images: ScanImages
    reference: dict
    seed: int


class Scanner:
    """Scans models of one architecture. It knows no attack."""

    def __init__(
        self,
        module: nn.Module,
        mesh: Mesh,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        batch_size: int,
        options: SearchOptions,
    ):
        """Creates a scanner. Its functions are compiled at the first call.

        Args:
            module: Architecture.
            mesh: Devices.
            image_shape: (H, W, C).
            num_classes: Number of classes K.
            batch_size: Number of images per call.
            options: Options of the search.
        """
        self._options = options
        # Scanners of the same setting do the same.
        self.setting = module, mesh, image_shape, num_classes, batch_size, options
        self._scorer = Scorer(ModelProbe(module, mesh, batch_size), module, mesh, batch_size)
        self._searches = {
            purified: TriggerSearch(module, mesh, image_shape, num_classes, options, purified=purified)
            for purified in (False, True)
        }

    def scan(self, inputs: ScanInputs, variables: dict, *, purified: bool) -> Scan:
        """Scans a model.

        Args:
            inputs: Images and reference model.
            variables: Variables of the model.
            purified: Whether the model was purified, which makes the verdict stricter.
        """
        images, labels, num_classes, held_out = inputs.images
        result = self._scorer.score(variables, images, labels, num_classes)
        # Models are searched with the same random numbers, which no training has used.
        key = key_for(inputs.seed, 'scan/search')
        changes = self._searches[purified].search(variables, inputs.reference, images, labels, key)
        fields = {'images': len(labels), 'held_out': held_out} | scan_fields(result, len(labels))
        return Scan(fields | {'search': search_fields(changes, self._options, purified)}, changes)


def scan_fields(result: InfectionScore, num_images: int) -> dict[str, Any]:
    """Converts an infection score to plain values for results.json.

    Args:
        result: Infection score of a model.
        num_images: Number of images that the model was scanned on.

    Returns:
        The fields of `InfectionScore.as_dict`, and three more. 'suspected_label' is the target label of an all2one
        backdoor; None for all2all. 'fooled' is the share of the images whose adversarial example fools the model, by
        `landing_eps`. 'largest_landing' is the share of the fooling examples that end up in the same class, for the
        class with the most of them, by `landing_eps`; None where no example fools the model.
    """
    fooled = result.landing.sum(axis=(1, 2))
    largest = result.landing.sum(axis=1).max(axis=1)
    suspected = result.hypothesis.target_map
    return {
        **result.as_dict(),
        'suspected_label': int(suspected[0]) if result.hypothesis.kind == ONE else None,
        'fooled': [round(float(n) / num_images, 6) for n in fooled],
        'largest_landing': [round(float(a / b), 6) if b else None for a, b in zip(largest, fooled, strict=True)],
    }


def limit_of(kind: str, purified: bool) -> float:
    """Returns the excess above which a change of a kind decides the verdict."""
    if purified:
        return PURIFIED_LIMITS.get(kind, OTHER_PURIFIED_LIMIT)
    return LIMITS.get(kind, OTHER_LIMIT)


def search_fields(changes: Sequence[FoundChange], options: SearchOptions, purified: bool) -> dict[str, Any]:
    """Converts the result of a search to plain values for results.json, with the verdict.

    Args:
        changes: Best change of each kind.
        options: Options of the search.
        purified: Whether the model was purified.

    Returns:
        'verdict', one of INFECTED, NOT_ERASED and NOTHING_FOUND; 'steps' and 'factor' of the search; and 'changes', a
        dict for each kind, the one that is furthest above its 'limit' first. 'label' is the label that the change leads
        to, None for an all2all backdoor.
    """
    fields: list[dict[str, Any]] = [
        {
            'kind': change.kind,
            'backdoor': change.hypothesis.kind,
            'label': int(change.hypothesis.target_map[0]) if change.hypothesis.kind == ONE else None,
            'excess': round(change.hypothesis.score, 6),
            'limit': limit_of(change.kind, purified),
            'share': round(change.share, 6),
            'reference_share': round(change.reference_share, 6),
        }
        for change in changes
    ]
    fields.sort(key=lambda change: change['limit'] - change['excess'])
    found = fields[0]['excess'] > fields[0]['limit']
    return {
        'verdict': (NOT_ERASED if purified else INFECTED) if found else NOTHING_FOUND,
        'steps': options.steps,
        'factor': options.factor_for(purified),
        'changes': fields,
    }
