"""Scans models for a backdoor with clean images alone: the infection score, and the landing of adversarial examples."""

from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from aft_jax.analysis.infection_score import ONE, InfectionScore, Scorer
from aft_jax.analysis.probe import ModelProbe
from aft_jax.data.dataset import Dataset
from aft_jax.randomness import generator_for

# Images per class that a meaningful score needs.
MIN_IMAGES_PER_CLASS = 20
# More images per class only cost time.
MAX_IMAGES_PER_CLASS = 50


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


class Scanner:
    """Scans models of one architecture on the same images. It knows no attack."""

    def __init__(self, module: nn.Module, mesh: Mesh, images: ScanImages, batch_size: int):
        """Creates a scanner for one architecture.

        Args:
            module: Architecture.
            mesh: Devices.
            images: Images that all models are scanned on.
            batch_size: Largest number of images per call.
        """
        self._images = images
        batch_size = min(batch_size, len(images.labels))
        self._scorer = Scorer(ModelProbe(module, mesh, batch_size), module, mesh, batch_size)

    def scan(self, variables: dict) -> dict[str, Any]:
        """Scans a model, and returns the fields of `scan_fields`."""
        images, labels, num_classes, held_out = self._images
        result = self._scorer.score(variables, images, labels, num_classes)
        return {'images': len(labels), 'held_out': held_out} | scan_fields(result, len(labels))


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
