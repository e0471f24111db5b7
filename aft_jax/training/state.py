"""The state that training carries from step to step."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct

Metrics = dict[str, jax.Array]
Batch = dict[str, Any]


class HasStep(Protocol):
    """Any pytree that counts its own steps; all that the loop asks of a state."""

    @property
    def step(self) -> jax.Array: ...


# (state, batch, key) -> (state, metrics)
Step = Callable[[Any, Batch, jax.Array], tuple[Any, Metrics]]


@struct.dataclass
class TrainState:
    """A classifier in training.

    Attributes:
        step: int32 scalar, steps taken.
        params: The model's parameters, float32.
        batch_stats: BatchNorm's running statistics, float32.
        opt_state: The optimiser's state.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState

    @property
    def variables(self) -> dict:
        """What the model's `apply` takes."""
        return {'params': self.params, 'batch_stats': self.batch_stats}


def create(variables: dict, optimiser: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step, from the model's variables."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables['params'],
        batch_stats=variables.get('batch_stats', {}),
        opt_state=optimiser.init(variables['params']),
    )
