"""Checks that both sides compute the same logits and adversarial examples, before anything is timed.

The weights are the same, so the logits agree up to rounding. Adversarial examples may differ in pixels whose gradient
is close to zero. Rounding decides the sign of such a gradient, and the pixel then moves in the other direction. The
gradients of the next steps then differ slightly everywhere. In float32 on a CPU no pixel of the MNIST CNN differed, and
2 % of the pixels of PreActResNet18 after seven steps.
"""

from typing import NamedTuple, Protocol

import numpy as np

from aft_jax.errors import UserError

# Largest difference of equal pixels: rounding is 1e-7, a changed sign 2 step sizes.
EQUAL = 1e-5


class Tolerance(NamedTuple):
    """The largest differences that are allowed.

    Attributes:
        logits: Largest difference of logits, as a share of the largest logit.
        pixels: Share of pixels that differ.
    """

    logits: float
    pixels: float


# EXACT is for float32. ROUNDED is for products rounded to bfloat16 or TF32, which each side does differently.
EXACT = Tolerance(1e-4, 0.05)
ROUNDED = Tolerance(0.05, 0.4)


class Side(Protocol):
    """One of the sides that are compared: ours or a baseline."""

    def logits(self, pixels: np.ndarray) -> np.ndarray: ...

    def examples(self, pixels: np.ndarray, labels: np.ndarray) -> np.ndarray: ...


class Disagreement(NamedTuple):
    """Differences of two sides, with the fields of `Tolerance`."""

    logits: float
    pixels: float


def compare(ours: Side, theirs: Side, pixels: np.ndarray, labels: np.ndarray) -> Disagreement:
    """Computes the differences of two sides on float32 images [B, H, W, C] in [0, 1] and labels [B]."""
    a, b = ours.logits(pixels), theirs.logits(pixels)
    far = np.abs(ours.examples(pixels, labels) - theirs.examples(pixels, labels)) >= EQUAL
    return Disagreement(float(np.abs(a - b).max() / np.abs(a).max()), float(far.mean()))


def require(name: str, differences: Disagreement, tolerance: Tolerance) -> None:
    """Checks that the differences are within the tolerance.

    Raises:
        UserError: If they are not, or are NaN.
    """
    if not (differences.logits <= tolerance.logits and differences.pixels <= tolerance.pixels):
        raise UserError(
            f'{name} and ours do not agree, so nothing is timed: logits differ by {differences.logits:.1e} of the '
            f'largest ({tolerance.logits:.0e} is allowed), and {differences.pixels:.2%} of the pixels of adversarial '
            f'examples differ ({tolerance.pixels:.0%} is allowed).'
        )
