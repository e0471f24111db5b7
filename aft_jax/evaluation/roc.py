"""How well a score tells two kinds apart."""

import numpy as np


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Returns the area under the ROC curve: the chance that a positive outscores a negative, ties counting half.

    It is the Mann-Whitney statistic over the number of pairs; NaN where either kind has no member.

    Args:
        positives: Scores [P] of those that should have high ones.
        negatives: Scores [N] of the others.
    """
    positives, negatives = np.asarray(positives, np.float64), np.sort(np.asarray(negatives, np.float64))
    pairs = len(positives) * len(negatives)
    if pairs == 0:
        return float('nan')
    below = np.searchsorted(negatives, positives, 'left')
    not_above = np.searchsorted(negatives, positives, 'right')
    return float((below + not_above).sum() / (2 * pairs))
