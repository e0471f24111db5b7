"""ACC, ASR, RA and DER, from predictions.

    ACC  clean accuracy: share of clean test images that get their true label
    ASR  attack success rate: share of triggered images that get the label the trigger commands
    RA   robust accuracy: share of triggered images that get their true label
    cross ACC  share of images in the attack's cross mode, where it has one, that get their true label
    DER  defense effectiveness rating (BackdoorBench): what a defense gained in ASR less what it cost in ACC

ASR and RA leave out images whose true label is already the commanded one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from aft_jax.evaluation.roc import auc


class Scores(NamedTuple):
    """Shares in 0..1; the per-class arrays are float64 [K], NaN where a class has no image to count."""

    acc: float
    asr: float
    ra: float
    acc_per_class: np.ndarray
    asr_per_class: np.ndarray
    ra_per_class: np.ndarray
    cross_acc: float = math.nan


def score(
    clean_predictions: np.ndarray,
    triggered_predictions: np.ndarray | None,
    labels: np.ndarray,
    target_map: np.ndarray | None,
    num_classes: int,
    crossed_predictions: np.ndarray | None = None,
) -> Scores:
    """Returns the scores of one model.

    Args:
        clean_predictions: int [N], of the clean test images.
        triggered_predictions: int [N], of the same images with the trigger; None where there is no attack.
        labels: int [N], the true classes.
        target_map: int [K], the label that the trigger commands for each true class; None likewise.
        num_classes: K.
        crossed_predictions: int [N], of the same images in the attack's cross mode; None where it has none.

    Returns:
        ACC, ASR and RA, in all and per true class, and the cross accuracy; what an attack does not have is NaN.
    """
    correct = clean_predictions == labels
    if triggered_predictions is None or target_map is None:
        nothing = np.zeros(0, bool)
        succeeded = recovered = nothing
        counted_labels = np.zeros(0, labels.dtype)
    else:
        commanded = target_map[labels]
        counts = commanded != labels
        succeeded = (triggered_predictions == commanded)[counts]
        recovered = (triggered_predictions == labels)[counts]
        counted_labels = labels[counts]
    return Scores(
        acc=_mean(correct),
        asr=_mean(succeeded),
        ra=_mean(recovered),
        acc_per_class=_per_class(correct, labels, num_classes),
        asr_per_class=_per_class(succeeded, counted_labels, num_classes),
        ra_per_class=_per_class(recovered, counted_labels, num_classes),
        cross_acc=math.nan if crossed_predictions is None else _mean(crossed_predictions == labels),
    )


class Detection(NamedTuple):
    """How well a defense that holds a suspect training set tells its poisoned images from the others.

    Attributes:
        poisoned_shares: Of each subset that it trained on.
        aucs: Area under the ROC curve of each score as a detector of poisoned images; NaN without any.
    """

    poisoned_shares: tuple[float, ...]
    aucs: tuple[float, ...]


def detection(scores: Sequence[np.ndarray], subsets: Sequence[np.ndarray], poisoned: np.ndarray) -> Detection:
    """Judges the subsets and scores of a defense that is given a suspect training set.

    Args:
        scores: float [N] each; high for an image that is held to be clean.
        subsets: int, indices of the training set.
        poisoned: int, the indices that carry the trigger.
    """
    clean = [np.delete(score, poisoned) for score in scores]
    return Detection(
        poisoned_shares=tuple(float(np.isin(subset, poisoned).mean()) for subset in subsets),
        aucs=tuple(auc(-score[poisoned], -rest) for score, rest in zip(scores, clean, strict=True)),
    )


def defense_effectiveness(before: Scores, after: Scores) -> float:
    """Returns DER = (max(0, ASR before - after) - max(0, ACC before - after) + 1) / 2, in 0..1; NaN without an attack.

    Source: Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization" (2023),
    as BackdoorBench reports it.
    """
    if math.isnan(before.asr) or math.isnan(after.asr):
        return math.nan  # max(0.0, nan) is 0.0, which would make it a number
    return (max(0.0, before.asr - after.asr) - max(0.0, before.acc - after.acc) + 1) / 2


def _mean(hits: np.ndarray) -> float:
    return float(hits.mean()) if len(hits) else float('nan')


def _per_class(hits: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.array([_mean(hits[labels == k]) for k in range(num_classes)])
