"""Scores of a model, from its predictions: ACC, ASR, RA and DER.

    ACC        clean accuracy: share of clean test images that are classified as their true label
    ASR        attack success rate: share of triggered images that are classified as the target label
    RA         robust accuracy: share of triggered images that are classified as their true label
    cross ACC  share of images in the attack's cross mode, where it has one, that are classified as their true label
    DER        defense effectiveness rating (BackdoorBench): the fall of ASR minus the fall of ACC, scaled to 0..1

ASR and RA leave out images whose true label is the target label.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from aft_jax.evaluation.roc import auc


class Scores(NamedTuple):
    """Scores of one model, as shares in 0..1. Scores that do not exist are NaN.

    Attributes:
        acc: Clean accuracy.
        asr: Attack success rate.
        ra: Robust accuracy.
        acc_per_class: Clean accuracy by true class, float64 [K]; NaN for a class without images.
        asr_per_class: Attack success rate by true class, in the same form.
        ra_per_class: Robust accuracy by true class, in the same form.
        cross_acc: Accuracy in the attack's cross mode.
    """

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
    cross_predictions: np.ndarray | None = None,
) -> Scores:
    """Scores the predictions of one model.

    Args:
        clean_predictions: Predictions for the clean test images, int [N].
        triggered_predictions: Predictions for the same images with the trigger, int [N]; None without an attack.
        labels: True labels, int [N].
        target_map: Target label for each true label, int [K]; None without an attack.
        num_classes: Number of classes K.
        cross_predictions: Predictions for the same images in the attack's cross mode, int [N]; None without one.
    """
    correct = clean_predictions == labels
    if triggered_predictions is None or target_map is None:
        succeeded = recovered = np.zeros(0, bool)
        counted_labels = np.zeros(0, labels.dtype)
    else:
        target_labels = target_map[labels]
        counts = target_labels != labels
        succeeded = (triggered_predictions == target_labels)[counts]
        recovered = (triggered_predictions == labels)[counts]
        counted_labels = labels[counts]
    return Scores(
        acc=_mean(correct),
        asr=_mean(succeeded),
        ra=_mean(recovered),
        acc_per_class=_per_class(correct, labels, num_classes),
        asr_per_class=_per_class(succeeded, counted_labels, num_classes),
        ra_per_class=_per_class(recovered, counted_labels, num_classes),
        cross_acc=math.nan if cross_predictions is None else _mean(cross_predictions == labels),
    )


class PoisonDetection(NamedTuple):
    """How well a defense detects the poisoned images of an untrusted training set.

    Attributes:
        poisoned_shares: Share of poisoned images in each subset that the defense trained on.
        aucs: Area under the ROC curve of each score as a detector; NaN without poisoned images.
    """

    poisoned_shares: tuple[float, ...]
    aucs: tuple[float, ...]


def poison_detection(
    scores: Sequence[np.ndarray], subsets: Sequence[np.ndarray], poisoned: np.ndarray
) -> PoisonDetection:
    """Measures how well a defense detects the poisoned images of an untrusted training set.

    Args:
        scores: Score of each training image, float [N], one array a round; high means clean.
        subsets: Indices of the training images that the defense trained on, int, one array a round.
        poisoned: Indices of the training images that carry the trigger, int.
    """
    clean = [np.delete(score, poisoned) for score in scores]
    return PoisonDetection(
        poisoned_shares=tuple(float(np.isin(subset, poisoned).mean()) for subset in subsets),
        aucs=tuple(auc(-score[poisoned], -rest) for score, rest in zip(scores, clean, strict=True)),
    )


def defense_effectiveness(before: Scores, after: Scores) -> float:
    """Computes DER = (max(0, ASR before - after) - max(0, ACC before - after) + 1) / 2, in 0..1; NaN without an attack.

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
