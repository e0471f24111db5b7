"""The observation for one model, one norm and one eps, beside the benign control: what results.json keeps of it."""

import math
from typing import Any, NamedTuple

import numpy as np

from aft_jax.adversarial.pgd import Norm
from aft_jax.analysis.measures import Overlap, neuron_overlap, target_share
from aft_jax.analysis.probe import Probe
from aft_jax.evaluation import bootstrap
from aft_jax.evaluation.bootstrap import RESAMPLES, Estimate


class Shown(NamedTuple):
    """What is measured on.

    Attributes:
        clean: uint8 [N, H, W, C].
        triggered: The same images with the trigger, uint8.
        labels: int32 [N], true.
        target_map: int32 [K], the label that the trigger commands for each true class.
    """

    clean: np.ndarray
    triggered: np.ndarray
    labels: np.ndarray
    target_map: np.ndarray

    @property
    def counted(self) -> 'Shown':
        """Those whose true label is not the commanded one."""
        counts = self.target_map[self.labels] != self.labels
        return self._replace(clean=self.clean[counts], triggered=self.triggered[counts], labels=self.labels[counts])


class Measured(NamedTuple):
    """The three measurements of one model with one set of adversarial examples, and how many of those fool it."""

    fooled: float
    target_share: Estimate
    feature_distance: Estimate
    neuron_overlap: Overlap


def evaluate(probe: Probe, variables: dict, adversarial: np.ndarray, images: Shown) -> Measured:
    """Returns the three measurements in one model, over the images whose true label is not the commanded one.

    All adversarial examples count for the last two, whether they fool the model or not, so that examples made on
    different models are compared on the same images.

    Args:
        probe: For its architecture.
        variables: The model's.
        adversarial: float32 [N, H, W, C], adversarial examples of `images.counted`, of this model or another.
        images: What is measured on.
    """
    images = images.counted
    said = probe.predict(variables, adversarial)
    return Measured(
        fooled=float(np.mean(said != images.labels)),
        target_share=target_share(said, images.labels, images.target_map),
        feature_distance=bootstrap.mean(probe.distances(variables, adversarial, images.triggered)),
        neuron_overlap=neuron_overlap(
            probe.channels(variables, images.clean),
            probe.channels(variables, images.triggered),
            probe.channels(variables, adversarial),
        ),
    )


def connection(
    probe: Probe,
    variables: dict,
    benign: dict | None,
    images: Shown,
    norm: Norm,
    eps: float,
    examples: np.ndarray | None = None,
) -> dict[str, Any]:
    """Returns the observation for one model as plain values.

    Args:
        probe: For the architecture.
        variables: Of the infected model, or of a purified one.
        benign: Of a benign model of the same data; None where there is none.
        images: What is measured on.
        norm: Of the adversarial changes.
        eps: Their size, as `Probe.adversarial` has it.
        examples: The model's own, of `images.counted`, where they are at hand; else they are made.

    Returns:
        'target_share', 'feature_distance' and 'neuron_overlap'. The last two have 'own' (the model's own adversarial
        examples) and 'benign' (those made on the benign model, seen by this one); 'benign_target_share' is the benign
        model's own. 'intervals' has the same names with [low, high]. What does not exist is None.
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
        theirs = evaluate(probe, variables, benign_examples, images)
        said = probe.predict(benign, benign_examples)
        estimates['benign_target_share'] = target_share(said, counted.labels, counted.target_map)
        estimates['feature_distance']['benign'] = theirs.feature_distance
        estimates['neuron_overlap']['benign'] = theirs.neuron_overlap._asdict()
    return {
        'norm': norm,
        'eps': eps,
        'images': len(counted.labels),
        'resamples': RESAMPLES,
        'fooled': own.fooled,
        **_each(estimates, lambda e: _number(e.value)),
        'intervals': _each(estimates, lambda e: [_number(e.low), _number(e.high)]),
    }


def _each(tree: dict[str, Any], function: Any) -> dict[str, Any]:
    return {
        name: function(value) if isinstance(value, Estimate) else _each(value, function) for name, value in tree.items()
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
