"""Batches cut into equal parts, whose intermediate results stay in a CPU's cache."""

import math


def nearest_divisor(number: int, wanted: float) -> int:
    """Returns the divisor of `number` whose ratio to `wanted` is nearest to 1."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / wanted)))
