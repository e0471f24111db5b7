"""The state that training carries from step to step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

Metrics = dict[str, jax.Array]
Batch = dict[str, Any]

# (state, batch, key) -> (state, metrics). The state is any pytree with a `step`.
Step = Callable[[Any, Batch, jax.Array], tuple[Any, Metrics]]


@struct.dataclass
class TrainState:
    """A classifier in training.

    Attributes:
        step: int32 scalar, steps taken.
        params: Parameters of the model, float32.
        batch_stats: Running statistics of BatchNorm, float32.
        opt_state: State of the optimiser.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState

    @property
    def variables(self) -> dict:
        """Variables that the model's `apply` takes."""
        return {'params': self.params, 'batch_stats': self.batch_stats}


@struct.dataclass
class WrapsClassifier:
    """Base of states that carry something beside a classifier in training.

    Attributes:
        classifier: State of the classifier.
    """

    classifier: TrainState

    @property
    def step(self) -> jax.Array:
        """int32 scalar, steps taken."""
        return self.classifier.step

    @property
    def variables(self) -> dict:
        """Variables of the classifier."""
        return self.classifier.variables


def create(variables: dict, optimiser: optax.GradientTransformation) -> TrainState:
    """Creates the state before the first step, from the model's variables."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables['params'],
        batch_stats=variables.get('batch_stats', {}),
        opt_state=optimiser.init(variables['params']),
    )
