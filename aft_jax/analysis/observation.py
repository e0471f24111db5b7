"""The observation of an experiment: outputs of its models for a sample of the test images, as plain values."""

from typing import Any, NamedTuple

import numpy as np

from aft_jax.evaluation.bootstrap import Estimate

CLEAN, TRIGGERED, ADVERSARIAL = 'clean', 'triggered', 'adversarial'


class ModelOutputs(NamedTuple):
    """Outputs of one model for N images, by kind of image. 'adversarial' are the adversarial examples of this model.

    Attributes:
        predictions: Predicted classes, int32 [N] for each kind.
        channels: Mean activation of each channel of the last feature map, float32 [N, C] for each kind. Empty for a
            network that does not return its feature maps.
    """

    predictions: dict[str, np.ndarray]
    channels: dict[str, np.ndarray]


class Observation(NamedTuple):
    """N test images, and the outputs of the models for them.

    Attributes:
        labels: True labels, int32 [N]. With an attack, no image has the target label already.
        target_map: Target label for each true label, int32 [K]; None without a known trigger.
        eps: Size of the adversarial perturbations (Linf), in [0, 1].
        images: Images by kind, uint8 [N, H, W, C]. The adversarial ones are those of the first model. Without a known
            trigger there are no triggered ones.
        outputs: Outputs by model; the first model is the infected, benign or given one.
        transferred: Predictions of each model for the adversarial examples of the first model, int32 [N].
        swept_eps: Sizes of the perturbations in the sweep, rising.
        swept: Target share of each swept model at each of `swept_eps`; empty without a known trigger.
        connection: Measurements for results.json; None without a known trigger or without feature maps.
    """

    labels: np.ndarray
    target_map: np.ndarray | None
    eps: float
    images: dict[str, np.ndarray]
    outputs: dict[str, ModelOutputs]
    transferred: dict[str, np.ndarray]
    swept_eps: tuple[float, ...]
    swept: dict[str, list[Estimate]]
    connection: dict[str, Any] | None
