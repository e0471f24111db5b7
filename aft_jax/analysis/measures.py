"""The three measurements of the observation, from what models said; source: arXiv 2202.06312, section 3.

    target share      of the adversarial examples that fool the model, the share that get the commanded label
    feature distance  mean L2 distance in the last feature map between adversarial and triggered versions of images
    neuron overlap    channels ranked by how much more active they are on triggered than on clean images, and likewise
                      on adversarial ones: Jaccard overlap of the two top-k sets, and correlation of the two rises

Images whose true label is the commanded one already are for the caller to leave out of the last two.
"""

from typing import NamedTuple

import numpy as np

from aft_jax.evaluation import bootstrap
from aft_jax.evaluation.bootstrap import Estimate


class Overlap(NamedTuple):
    """Neuron overlap: Jaccard overlaps of the top 5 % and 10 % of channels, and Pearson's correlation."""

    top_5: Estimate
    top_10: Estimate
    correlation: Estimate


def target_share(predictions: np.ndarray, labels: np.ndarray, target_map: np.ndarray, seed: int = 0) -> Estimate:
    """Returns the share of fooling adversarial examples that get the commanded label; NaN where none fools.

    Args:
        predictions: int [N], of untargeted adversarial examples.
        labels: int [N], their true classes; images of a class that is its own target are left out.
        target_map: int [K], the label that the trigger commands for each true class.
        seed: Of the bootstrap.
    """
    commanded = target_map[labels]
    fooled = (predictions != labels) & (commanded != labels)
    return bootstrap.mean((predictions == commanded)[fooled], seed)


def neuron_overlap(clean: np.ndarray, triggered: np.ndarray, adversarial: np.ndarray, seed: int = 0) -> Overlap:
    """Returns how alike the channels are that the trigger and the adversarial changes raise.

    Args:
        clean: Mean activation of each channel on N images, [N, C].
        triggered: On the same images with the trigger.
        adversarial: On adversarial examples of the same images.
        seed: Of the bootstrap.
    """
    by_trigger = triggered.astype(np.float64) - clean
    by_change = adversarial.astype(np.float64) - clean
    count, channels = clean.shape

    def top(share: float) -> Estimate:
        k = max(1, round(share * channels))
        return bootstrap.estimate(lambda w: jaccard(w @ by_trigger, w @ by_change, k), count, seed)

    correlation = bootstrap.estimate(lambda w: correlations(w @ by_trigger, w @ by_change), count, seed)
    return Overlap(top(0.05), top(0.10), correlation)


def jaccard(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """Returns |A & B| / |A | B| [R] of the sets A, B of the k largest in each row of [R, C]; equals go by position."""
    both = (_is_top(a, k) & _is_top(b, k)).sum(axis=1)
    return both / (2 * k - both)


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns Pearson's correlation [R] of each row of [R, C] with the other's; NaN where a row is constant."""
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), scale, out=np.full(len(a), np.nan), where=scale > 0)


def _is_top(values: np.ndarray, k: int) -> np.ndarray:
    order = np.argsort(-values, axis=1, kind='stable')[:, :k]
    top = np.zeros(values.shape, bool)
    np.put_along_axis(top, order, True, axis=1)
    return top
