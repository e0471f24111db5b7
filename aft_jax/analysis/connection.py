"""Measures the observation for one model, one norm and one eps, with a benign control, for results.json."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from aft_jax.adversarial.pgd import Norm
from aft_jax.analysis.measures import Overlap, neuron_overlap, target_share
from aft_jax.analysis.probe import ModelProbe
from aft_jax.evaluation import bootstrap
from aft_jax.evaluation.bootstrap import RESAMPLES, Estimate


class MeasuredImages(NamedTuple):
    """The images that a model is measured on, [N, H, W, C]: uint8, or float32 in [0, 1].

    Attributes:
        clean: Clean images.
        triggered: The same images with the trigger.
        labels: True labels, int32 [N].
        target_map: Target label for each true label, int32 [K].
    """

    clean: np.ndarray
    triggered: np.ndarray
    labels: np.ndarray
    target_map: np.ndarray

    @property
    def counted(self) -> 'MeasuredImages':
        """The images whose true label is not the target label."""
        counts = self.target_map[self.labels] != self.labels
        return self._replace(clean=self.clean[counts], triggered=self.triggered[counts], labels=self.labels[counts])


class Measured(NamedTuple):
    """The measurements of one model with one set of adversarial examples.

    Attributes:
        fooled: Share of the adversarial examples that fool the model.
        target_share: See `measures`.
        feature_distance: See `measures`.
        neuron_overlap: See `measures`.
    """

    fooled: float
    target_share: Estimate
    feature_distance: Estimate
    neuron_overlap: Overlap


def evenly(size: int, count: int) -> np.ndarray:
    """Chooses `count` indices, or all, evenly spaced over `size`. Stored images may be sorted by class."""
    return np.linspace(0, size - 1, min(size, count)).round().astype(np.int64)


def evaluate(probe: ModelProbe, variables: dict, adversarial: np.ndarray, images: MeasuredImages) -> Measured:
    """Measures one model on the images whose true label is not the target label.

    All adversarial examples count for the feature distance and the neuron overlap, whether they fool the model or not.
    So examples made on different models are compared on the same images.

    Args:
        probe: Compiled functions for the architecture.
        variables: Variables of the model.
        adversarial: Adversarial examples of `images.counted`, of this model or another, float32 [N, H, W, C].
        images: Images to measure on.
    """
    images = images.counted
    predictions = probe.predict(variables, adversarial)
    return Measured(
        fooled=float(np.mean(predictions != images.labels)),
        target_share=target_share(predictions, images.labels, images.target_map),
        feature_distance=bootstrap.mean(probe.distances(variables, adversarial, images.triggered)),
        neuron_overlap=neuron_overlap(
            probe.channels(variables, images.clean),
            probe.channels(variables, images.triggered),
            probe.channels(variables, adversarial),
        ),
    )


def connection(
    probe: ModelProbe,
    variables: dict,
    benign: dict | None,
    images: MeasuredImages,
    *,
    norm: Norm,
    eps: float,
    examples: np.ndarray | None = None,
) -> dict[str, Any]:
    """Measures the observation for one model, as plain values.

    Args:
        probe: Compiled functions for the architecture.
        variables: Variables of the infected model, or of a purified one.
        benign: Variables of a benign model of the same data, or None.
        images: Images to measure on.
        norm: Norm of the adversarial perturbations.
        eps: Size of the perturbations, in the units of `ModelProbe.adversarial`.
        examples: Adversarial examples of `images.counted` for this model, if they exist already.

    Returns:
        'target_share', 'feature_distance' and 'neuron_overlap'. The last two have 'own' (for adversarial examples of
        the model itself) and 'benign' (for adversarial examples of the benign model). 'benign_target_share' is the
        target share in the benign model, for its own examples. 'intervals' has the same names with [low, high].
        Values that do not exist are None.
    """
    counted = images.counted
    if examples is None:
        examples = probe.adversarial(variables, counted.clean, counted.labels, norm, eps)
    own = evaluate(probe, variables, examples, images)
    estimates: dict[str, Any] = {
        'target_share': own.target_share,
        'benign_target_share': bootstrap.NOTHING,
        'feature_distance': {'own': own.feature_distance},
        'neuron_overlap': {'own': own.neuron_overlap._asdict()},
    }
    if benign is not None:
        benign_examples = probe.adversarial(benign, counted.clean, counted.labels, norm, eps)
        transferred = evaluate(probe, variables, benign_examples, images)
        predictions = probe.predict(benign, benign_examples)
        estimates['benign_target_share'] = target_share(predictions, counted.labels, counted.target_map)
        estimates['feature_distance']['benign'] = transferred.feature_distance
        estimates['neuron_overlap']['benign'] = transferred.neuron_overlap._asdict()
    return {
        'norm': norm,
        'eps': eps,
        'images': len(counted.labels),
        'resamples': RESAMPLES,
        'fooled': own.fooled,
        **_map_estimates(estimates, lambda e: _number(e.value)),
        'intervals': _map_estimates(estimates, lambda e: [_number(e.low), _number(e.high)]),
    }


def _map_estimates(tree: dict[str, Any], function: Callable[[Estimate], Any]) -> dict[str, Any]:
    """Applies a function to every estimate of a nested dict."""
    return {
        name: function(value) if isinstance(value, Estimate) else _map_estimates(value, function)
        for name, value in tree.items()
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
