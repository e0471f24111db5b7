"""Area under the ROC curve: how well a score separates two classes."""

import numpy as np


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Computes the area under the ROC curve: the probability that a positive has the higher score.

    A tie counts as one half. The value is the Mann-Whitney statistic divided by the number of pairs. It is NaN without
    positives or without negatives.

    Args:
        positives: Scores [P] of the positives, which should be high.
        negatives: Scores [N] of the negatives.
    """
    positives, negatives = np.asarray(positives, np.float64), np.sort(np.asarray(negatives, np.float64))
    pairs = len(positives) * len(negatives)
    if pairs == 0:
        return float('nan')
    below = np.searchsorted(negatives, positives, 'left')
    not_above = np.searchsorted(negatives, positives, 'right')
    return float((below + not_above).sum() / (2 * pairs))
