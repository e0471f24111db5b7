"""Whether both sides compute the same, asked before anything is timed: logits, and adversarial examples.

The weights are the same, so the logits are the same up to rounding. Examples are equal pixel by pixel but where a
gradient is so near zero that rounding turns its sign: such a pixel goes the other way, and the gradients of the next
steps are a little different everywhere. In float32 on a CPU the examples of the MNIST CNN had no such pixel, and
those of PreActResNet18 2 % after seven steps.
"""

from typing import NamedTuple, Protocol

import numpy as np

from aft_jax.errors import UserError

# Pixels are equal if they differ by less: rounding is 1e-7, a turned sign 2 step sizes.
EQUAL = 1e-5


class Tolerance(NamedTuple):
    """What may differ.

    Attributes:
        logits: Of the largest logit.
        pixels: Share of pixels that are not equal.
    """

    logits: float
    pixels: float


# In float32; and where products are rounded to bfloat16 or TF32, each side in its own way.
EXACT = Tolerance(1e-4, 0.05)
ROUNDED = Tolerance(0.05, 0.4)


class Side(Protocol):
    """Ours or theirs."""

    def logits(self, pixels: np.ndarray) -> np.ndarray: ...

    def examples(self, pixels: np.ndarray, labels: np.ndarray) -> np.ndarray: ...


class Disagreement(NamedTuple):
    """How far two sides are from each other; as for `Tolerance`."""

    logits: float
    pixels: float


def compare(ours: Side, theirs: Side, pixels: np.ndarray, labels: np.ndarray) -> Disagreement:
    """Returns how far they are from each other on float32 images [B, H, W, C] in [0, 1] and labels [B]."""
    a, b = ours.logits(pixels), theirs.logits(pixels)
    far = np.abs(ours.examples(pixels, labels) - theirs.examples(pixels, labels)) >= EQUAL
    return Disagreement(float(np.abs(a - b).max() / np.abs(a).max()), float(far.mean()))


def require(name: str, found: Disagreement, tolerance: Tolerance) -> None:
    """Refuses to go on where two sides do not agree.

    Raises:
        UserError: They do not; NaN is no agreement either.
    """
    if not (found.logits <= tolerance.logits and found.pixels <= tolerance.pixels):
        raise UserError(
            f'{name} and ours do not agree, so nothing is timed: logits differ by {found.logits:.1e} of the largest '
            f'({tolerance.logits:.0e} is allowed), and {found.pixels:.2%} of the pixels of adversarial examples do '
            f'({tolerance.pixels:.0%}).'
        )
