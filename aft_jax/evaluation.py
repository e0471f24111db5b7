"""ACC, ASR, RA and DER, from predictions.

    ACC  clean accuracy: share of clean test images that get their true label
    ASR  attack success rate: share of triggered images that get the label the trigger commands
    RA   robust accuracy: share of triggered images that get their true label
    cross ACC  share of images in the attack's cross mode, where it has one, that get their true label
    DER  defense effectiveness rating (BackdoorBench): what a defense gained in ASR less what it cost in ACC

ASR and RA leave out images whose true label is already the commanded one.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aft_jax.models import logits_function
from aft_jax.training.mesh import along, place, replicated, settle, spread


class Scores(NamedTuple):
    """Shares in 0..1; the per-class arrays are float64 [K], NaN where a class has no image to count."""

    acc: float
    asr: float
    ra: float
    acc_per_class: np.ndarray
    asr_per_class: np.ndarray
    ra_per_class: np.ndarray
    cross_acc: float = math.nan


class Predictor:
    """Predicts the classes of many images with one compiled, sharded call a batch."""

    def __init__(self, module: nn.Module, mesh: Mesh, batch_size: int):
        """Predicts with `module` in evaluation mode; `batch_size` is rounded up to a multiple of the devices."""
        self._mesh = mesh
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        whole, cut = replicated(mesh), along(mesh, 0)

        def predict(variables, images):
            logits = logits_function(module, variables)(images.astype(jnp.float32) / 255.0)
            return logits.argmax(axis=-1).astype(jnp.int32)

        self._predict: Callable = jax.jit(predict, in_shardings=(whole, cut), out_shardings=whole)

    def __call__(self, variables: Any, images: np.ndarray) -> np.ndarray:
        """Returns int32 [N] for uint8 images [N, H, W, C]; the last batch is padded and the padding discarded."""
        variables = place(self._mesh, {name: variables[name] for name in variables})
        predictions = []
        for first in range(0, len(images), self._batch_size):
            part = images[first : first + self._batch_size]
            padding = np.zeros((self._batch_size - len(part), *images.shape[1:]), images.dtype)
            padded = np.concatenate([part, padding])
            images_there = spread(along(self._mesh, 0), padded.shape, padded.__getitem__)
            predicted = settle(self._mesh, self._predict(variables, images_there))
            predictions.append((predicted, len(part)))
        return np.concatenate([np.asarray(predicted)[:count] for predicted, count in predictions])


def score(
    clean_predictions: np.ndarray,
    triggered_predictions: np.ndarray | None,
    labels: np.ndarray,
    target_map: np.ndarray | None,
    num_classes: int,
    crossed_predictions: np.ndarray | None = None,
) -> Scores:
    """Returns the scores of one model.

    Args:
        clean_predictions: int [N], of the clean test images.
        triggered_predictions: int [N], of the same images with the trigger; None where there is no attack.
        labels: int [N], the true classes.
        target_map: int [K], the label that the trigger commands for each true class; None likewise.
        num_classes: K.
        crossed_predictions: int [N], of the same images in the attack's cross mode; None where it has none.

    Returns:
        ACC, ASR and RA, in all and per true class, and the cross accuracy; what an attack does not have is NaN.
    """
    correct = clean_predictions == labels
    if triggered_predictions is None or target_map is None:
        nothing = np.zeros(0, bool)
        succeeded = recovered = nothing
        counted_labels = np.zeros(0, labels.dtype)
    else:
        commanded = target_map[labels]
        counts = commanded != labels
        succeeded = (triggered_predictions == commanded)[counts]
        recovered = (triggered_predictions == labels)[counts]
        counted_labels = labels[counts]
    return Scores(
        acc=_mean(correct),
        asr=_mean(succeeded),
        ra=_mean(recovered),
        acc_per_class=_per_class(correct, labels, num_classes),
        asr_per_class=_per_class(succeeded, counted_labels, num_classes),
        ra_per_class=_per_class(recovered, counted_labels, num_classes),
        cross_acc=math.nan if crossed_predictions is None else _mean(crossed_predictions == labels),
    )


def defense_effectiveness(before: Scores, after: Scores) -> float:
    """Returns DER = (max(0, ASR before - after) - max(0, ACC before - after) + 1) / 2, in 0..1; NaN without an attack.

    Source: Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization" (2023),
    as BackdoorBench reports it.
    """
    if math.isnan(before.asr) or math.isnan(after.asr):
        return math.nan  # max(0.0, nan) is 0.0, which would make it a number
    return (max(0.0, before.asr - after.asr) - max(0.0, before.acc - after.acc) + 1) / 2


def _mean(hits: np.ndarray) -> float:
    return float(hits.mean()) if len(hits) else float('nan')


def _per_class(hits: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.array([_mean(hits[labels == k]) for k in range(num_classes)])
