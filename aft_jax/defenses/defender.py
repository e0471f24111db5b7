"""What every defender holds, and how it begins."""

from typing import NamedTuple

import flax.linen as nn
import ml_collections
import numpy as np
import optax

from aft_jax.training import optimiser, state


class Holdings(NamedTuple):
    """All that a defender knows.

    Attributes:
        module: The classifier's architecture.
        variables: The suspect model's parameters and statistics.
        images: uint8 [N, H, W, C], clean.
        labels: int32 [N], true.
    """

    module: nn.Module
    variables: dict
    images: np.ndarray
    labels: np.ndarray

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What the training loop reads batches from."""
        return {'images': self.images, 'labels': self.labels}


def begin(
    holdings: Holdings, options: ml_collections.ConfigDict, train: ml_collections.ConfigDict, steps: int
) -> tuple[state.TrainState, optax.GradientTransformation]:
    """Returns the suspect model as a state before its first step, and the optimiser.

    Args:
        holdings: The defender's.
        options: The defense's own config: learning_rate, schedule and perhaps max_grad_norm.
        train: `config.train`, for momentum and weight_decay.
        steps: Length of the defense.
    """
    sgd = optimiser.sgd(
        options.learning_rate,
        options.schedule,
        steps,
        train.momentum,
        train.weight_decay,
        options.get('max_grad_norm', 0.0),
    )
    return state.create(holdings.variables, sgd), sgd
