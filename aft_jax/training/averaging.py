"""An exponential moving average of a model's weights beside the model in training.

The average of the last steps is better than the last step alone, since it lies in the middle of the region in which SGD
moves about.

Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992); Izmailov et al., "Averaging
Weights Leads to Wider Optima" (2018), for networks.
"""

from dataclasses import replace
from typing import Any, TypeVar

import jax
from flax import struct

from aft_jax.training.state import Batch, Metrics, Step, TrainState, WrapsClassifier


@struct.dataclass
class AveragedState(WrapsClassifier):
    """A classifier in training and the average of its variables.

    Attributes:
        classifier: State of the classifier.
        average: Averaged variables: parameters and BatchNorm statistics, float32.
    """

    average: Any

    @property
    def variables(self) -> dict:
        """Averaged variables, which are the result of the training."""
        return self.average


Averaged = TypeVar('Averaged', bound=AveragedState)


def init(classifier: TrainState) -> AveragedState:
    """Creates the state before the first step, whose average is the model itself."""
    return AveragedState(classifier, jax.tree.map(lambda x: x, classifier.variables))


def follow(state: Averaged, classifier: TrainState, decay: float) -> Averaged:
    """Stores the classifier after a step, and moves the average towards it.

    Args:
        state: State before the step.
        classifier: Classifier after the step.
        decay: Share of the average that stays.
    """
    average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.average, classifier.variables)
    return replace(state, classifier=classifier, average=average)


def averaged(step: Step, decay: float) -> Step:
    """Builds a step of an `AveragedState` from one of a `TrainState`; `decay` is as in `follow`."""

    def averaged_step(state: AveragedState, batch: Batch, key: jax.Array) -> tuple[AveragedState, Metrics]:
        classifier, metrics = step(state.classifier, batch, key)
        return follow(state, classifier, decay), metrics

    return averaged_step
