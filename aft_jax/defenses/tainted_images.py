"""Finds tainted images among the clean ones: images that carry the trigger, labelled with the target label.

A defender's clean images may come from where the attacker's did. A few images with the trigger among them keep the
backdoor alive through any fine-tuning, FST included. But they are also the best evidence of it:

    1. Features of the infected model tell them from the other images of their label. The outlier score of an image is
       the distance of its last feature maps, averaged over the positions, to the median of its label, each channel
       in units of its standard deviation. The images with the highest scores, a share of CANDIDATES, are put aside.
    2. A reference model (`defenses.reference`) is trained on the others, so its backdoor is erased.
    3. An image that was put aside is tainted if the infected model predicts its label, and the reference another one,
       with a difference of the log-probabilities of the label of at least MARGIN.
    4. Chance makes a few images look so. Only labels count that have several of them, and a larger share of them than
       other labels.

Images whose trigger leaves the features alone, such as a small rotation, are not found. Neither are those of an
all-to-all backdoor if each label has few of them.

Source: outliers of the features of a label are the idea of spectral signatures (Tran et al., NeurIPS 2018); predictions
that change when the backdoor is erased, that of PBE (Mu et al., CVPR 2023).
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aft_jax.defenses.aft import with_shift
from aft_jax.defenses.defender import DefenderData, DefenseSettings
from aft_jax.defenses.reference import fit_reference
from aft_jax.runtime.sharding import largest_batch
from aft_jax.training.prediction import BatchedFunction
from aft_jax.training.stage import Run

# Share of the images that is put aside, and steps of the reference.
CANDIDATES, REFERENCE_STEPS = 0.2, 300
# Difference of the log-probabilities of the label from which an image looks tainted.
MARGIN = 2.0
# A label counts if so many of its images look tainted, such a share of them, and so many times the others' mean share.
MIN_IMAGES, MIN_SHARE, MIN_CONTRAST = 3, 0.05, 3.0
_DEVIATION_FLOOR = 1e-6


class Evidence(NamedTuple):
    """What the two models say about the images.

    Attributes:
        aside: Whether an image was put aside, bool [N].
        infected: Log-probabilities of the infected model, [N, K].
        reference: Log-probabilities of the reference model, [N, K].
    """

    aside: np.ndarray
    infected: np.ndarray
    reference: np.ndarray


def find_tainted(run: Run, name: str, data: DefenderData, settings: DefenseSettings) -> np.ndarray:
    """Finds the tainted images; int32 indices in ascending order, empty if there are none.

    Args:
        run: Experiment.
        name: Name of checkpoints and metrics.
        data: Infected model and images. The module returns feature maps.
        settings: Settings with `AftOptions`.
    """
    function = BatchedFunction(
        partial(_features_and_logs, data.module), data.module, run.mesh, run.options.eval_batch_size
    )
    features, infected = function(data.variables, data.images)
    aside = put_aside(outlier_scores(features, data.labels))
    trusted = data._replace(images=data.images[~aside], labels=data.labels[~aside])
    settings = with_shift(settings, data.images.shape[1:])
    options = settings.options._replace(reference_steps=REFERENCE_STEPS)
    # Fewer images than a batch may be left.
    largest = largest_batch(run.mesh, len(trusted.labels))
    settings = settings._replace(options=options, batch_size=min(settings.batch_size, largest))
    reference = fit_reference(run, name, trusted, settings).state.variables
    return tainted(Evidence(aside, infected, function(reference, data.images)[1]), data.labels)


def put_aside(outliers: np.ndarray) -> np.ndarray:
    """Selects the share CANDIDATES of the images with the highest outlier scores [N]: bool [N]."""
    aside = np.zeros(len(outliers), bool)
    aside[np.argsort(-outliers, kind='stable')[: round(CANDIDATES * len(outliers))]] = True
    return aside


def outlier_scores(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Computes the outlier score of each image, [N].

    Args:
        features: Features of the infected model, [N, D].
        labels: int32 [N].
    """
    medians = np.zeros_like(features)
    for label in np.unique(labels):
        medians[labels == label] = np.median(features[labels == label], axis=0)
    return np.linalg.norm((features - medians) / (features.std(axis=0) + _DEVIATION_FLOOR), axis=1)


def tainted(evidence: Evidence, labels: np.ndarray) -> np.ndarray:
    """Selects the tainted images by what the models say; int32 indices in ascending order.

    Args:
        evidence: Images put aside, and log-probabilities.
        labels: int32 [N].
    """
    aside, infected, reference = evidence
    order = np.arange(len(labels))
    suspicious = infected.argmax(axis=1) == labels
    suspicious &= reference.argmax(axis=1) != labels
    suspicious &= infected[order, labels] - reference[order, labels] >= MARGIN
    suspicious &= aside
    present = np.unique(labels)
    shares = np.array([suspicious[labels == label].mean() for label in present])
    for i, label in enumerate(present):
        of_label = labels == label
        others = np.delete(shares, i)
        least = max(MIN_SHARE, MIN_CONTRAST * others.sum() / max(1, len(others)))
        if suspicious[of_label].sum() < MIN_IMAGES or shares[i] < least:
            suspicious[of_label] = False
    return np.flatnonzero(suspicious).astype(np.int32)


def _features_and_logs(module: nn.Module, variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the last feature maps, averaged over the positions, and the log-probabilities."""
    outputs: Any = module.apply(variables, images, features=True)
    logits, maps = outputs
    last = maps[-1].astype(jnp.float32)
    return last.mean(axis=tuple(range(1, last.ndim - 1))), jax.nn.log_softmax(logits)
