"""Estimates over images with bootstrap intervals (Efron, 1979): percentiles over resampled sets of images.

A statistic is a function of weights: float64 [R, N], each row the weights of the N images in one set, summing to 1;
it returns [R]. Equal weights give the estimate, and multinomial counts over N the resampled ones.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
COVERAGE = 0.95
Statistic = Callable[[np.ndarray], np.ndarray]


class Estimate(NamedTuple):
    """A value and the interval that 95 % of the resampled values lie in; NaN where there was no image."""

    value: float
    low: float
    high: float


NOTHING = Estimate(math.nan, math.nan, math.nan)


def estimate(statistic: Statistic, count: int, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Returns a statistic over `count` images with its percentile interval.

    Args:
        statistic: Weights float64 [R, N] -> values [R].
        count: N.
        seed: Of the resampling.
        resamples: How many sets of N images are drawn, with replacement.
    """
    if count == 0:
        return NOTHING
    equal = np.full((1, count), 1 / count)
    drawn = np.random.default_rng(seed).multinomial(count, equal[0], size=resamples) / count
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(statistic(drawn), [tail, 1 - tail])
    return Estimate(float(statistic(equal)[0]), float(low), float(high))


def mean(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Returns the mean of one value an image, [N], with its interval."""
    return estimate(lambda weights: weights @ values.astype(np.float64), len(values), seed, resamples)
