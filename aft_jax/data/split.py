"""A fixed stratified split, for data sets without a split of their own."""

import numpy as np


def stratified(labels: np.ndarray, test_share: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples into training and test ones, the same way in every run and on every machine.

    Args:
        labels: Integer labels [N]; every class has at least two examples.
        test_share: Share of each class that is held out, in (0, 1); rounded, but neither side of a class is empty.

    Returns:
        Indices of the training and of the test examples, int64, each in ascending order.
    """
    # NumPy guarantees that the numbers of RandomState never change. Those of Generator may change between versions.
    random = np.random.RandomState(0)
    held_out = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(len(members) * test_share), 1), len(members) - 1)
        held_out.append(random.permutation(members)[:count])
    test = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), test), test
