"""What the page shows of the models on a sample of the test images, as plain values."""

from typing import Any, NamedTuple

import numpy as np

from aft_jax.evaluation.bootstrap import Estimate

CLEAN, TRIGGERED, ADVERSARIAL = 'clean', 'triggered', 'adversarial'


class Seen(NamedTuple):
    """What one model makes of N images, by kind; 'adversarial' are its own adversarial examples of them.

    Attributes:
        said: int32 [N] each, the predicted classes.
        channels: float32 [N, C] each, the mean activation of each channel of the last feature map; empty for a network
            that does not show its feature maps.
    """

    said: dict[str, np.ndarray]
    channels: dict[str, np.ndarray]


class Observation(NamedTuple):
    """N test images and what the models make of them.

    Attributes:
        labels: int32 [N], the true classes; none is the commanded one where there is an attack.
        target_map: int32 [K], the label that the trigger commands for each true class; None without a known trigger.
        eps: Of the adversarial examples (Linf), in [0, 1].
        images: uint8 [N, H, W, C] by kind; the adversarial ones are those of the first model, and there are no
            triggered ones without a known trigger.
        seen: By model, the suspect first.
        transferred: By model, int32 [N], what it says of the first model's adversarial examples.
        swept_eps: Other sizes of the adversarial changes, rising.
        swept: By model, the target share at each of `swept_eps`; empty without a known trigger.
        connection: What results.json keeps; None without a known trigger or without feature maps.
    """

    labels: np.ndarray
    target_map: np.ndarray | None
    eps: float
    images: dict[str, np.ndarray]
    seen: dict[str, Seen]
    transferred: dict[str, np.ndarray]
    swept_eps: tuple[float, ...]
    swept: dict[str, list[Estimate]]
    connection: dict[str, Any] | None
