"""Estimates over images, with bootstrap confidence intervals (Efron, 1979): percentiles over resampled sets of images.

A statistic is a function of weights. It maps float64 [R, N] to [R]: each row holds the weights of the N images in one
set, and sums to 1. Equal weights give the estimate. Multinomial counts over N give the resampled values.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
COVERAGE = 0.95
Statistic = Callable[[np.ndarray], np.ndarray]


class Estimate(NamedTuple):
    """A value, and the interval that holds 95 % of the resampled values. All are NaN without images."""

    value: float
    low: float
    high: float


NOTHING = Estimate(math.nan, math.nan, math.nan)


def estimate(statistic: Statistic, count: int, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Estimates a statistic over `count` images, with its percentile interval.

    Args:
        statistic: Function of weights, float64 [R, N] -> values [R].
        count: Number of images N.
        seed: Seed of the resampling.
        resamples: Number of sets of N images that are drawn with replacement.
    """
    if count == 0:
        return NOTHING
    equal = np.full((1, count), 1 / count)
    drawn = np.random.default_rng(seed).multinomial(count, equal[0], size=resamples) / count
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(statistic(drawn), [tail, 1 - tail])
    return Estimate(float(statistic(equal)[0]), float(low), float(high))


def mean(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Estimates the mean of one value per image, [N], with its interval."""
    return estimate(lambda weights: weights @ values.astype(np.float64), len(values), seed, resamples)
