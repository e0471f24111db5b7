"""The three measurements of the observation (arXiv 2202.06312, section 3).

    target share      share of the adversarial examples that fool the model which are classified as the target label
    feature distance  mean L2 distance in the last feature map between adversarial and triggered versions of images
    neuron overlap    agreement of two rankings of channels: by the rise of their activation from clean to triggered
                      images, and by the rise from clean to adversarial images. Measured as the Jaccard overlap of the
                      top-k sets, and as the correlation of the rises.

The caller leaves images whose true label is the target label out of the last two.
"""

from typing import NamedTuple

import numpy as np

from aft_jax.evaluation import bootstrap
from aft_jax.evaluation.bootstrap import Estimate


class Overlap(NamedTuple):
    """Neuron overlap.

    Attributes:
        top_5: Jaccard overlap of the top 5 % of channels.
        top_10: Jaccard overlap of the top 10 % of channels.
        correlation: Pearson's correlation of the rises.
    """

    top_5: Estimate
    top_10: Estimate
    correlation: Estimate


def target_share(predictions: np.ndarray, labels: np.ndarray, target_map: np.ndarray, seed: int = 0) -> Estimate:
    """Estimates the share of fooling adversarial examples that are classified as the target label.

    Args:
        predictions: Predictions for untargeted adversarial examples, int [N].
        labels: True labels, int [N]. Images of a class that is its own target are left out.
        target_map: Target label for each true label, int [K].
        seed: Seed of the bootstrap.

    Returns:
        The share; NaN if no example fools the model.
    """
    target_labels = target_map[labels]
    fooled = (predictions != labels) & (target_labels != labels)
    return bootstrap.mean((predictions == target_labels)[fooled], seed)


def neuron_overlap(clean: np.ndarray, triggered: np.ndarray, adversarial: np.ndarray, seed: int = 0) -> Overlap:
    """Estimates how similar the channels are that the trigger and the adversarial perturbations activate.

    Args:
        clean: Mean activation of each channel on N clean images, [N, C].
        triggered: Mean activations on the same images with the trigger, [N, C].
        adversarial: Mean activations on adversarial examples of the same images, [N, C].
        seed: Seed of the bootstrap.
    """
    by_trigger = triggered.astype(np.float64) - clean
    by_perturbation = adversarial.astype(np.float64) - clean
    count, channels = clean.shape

    def top(share: float) -> Estimate:
        k = max(1, round(share * channels))
        return bootstrap.estimate(lambda w: jaccard(w @ by_trigger, w @ by_perturbation, k), count, seed)

    correlation = bootstrap.estimate(lambda w: correlations(w @ by_trigger, w @ by_perturbation), count, seed)
    return Overlap(top(0.05), top(0.10), correlation)


def jaccard(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """Computes |A & B| / |A | B|, [R], for the sets A and B of the k largest entries in each row of [R, C].

    Of equal entries, the first ones count as larger.
    """
    both = (_is_top(a, k) & _is_top(b, k)).sum(axis=1)
    return both / (2 * k - both)


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Computes Pearson's correlation, [R], between corresponding rows of [R, C]; NaN where a row is constant."""
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), scale, out=np.full(len(a), np.nan), where=scale > 0)


def _is_top(values: np.ndarray, k: int) -> np.ndarray:
    order = np.argsort(-values, axis=1, kind='stable')[:, :k]
    top = np.zeros(values.shape, bool)
    np.put_along_axis(top, order, True, axis=1)
    return top
