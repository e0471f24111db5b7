"""What every defender holds, how it begins, and how it tunes itself on nothing but its clean images."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from aft_jax.prediction import Predictor
from aft_jax.randomness import generator_for
from aft_jax.training import optimiser, state
from aft_jax.training.loop import Run


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


def hold_out(holdings: Holdings, share: float, seed: int) -> tuple[Holdings, Holdings]:
    """Returns the holdings in two: what a defense trains on, and what it tells apart its candidates by.

    Args:
        holdings: All of the defender's.
        share: Of each class, rounded, that is held out; every class of two images or more gives and keeps one.
        seed: The experiment's.
    """
    generator = generator_for(seed, 'purify/held_out')
    held = []
    for label in np.unique(holdings.labels):
        members = np.flatnonzero(holdings.labels == label)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.append(generator.permutation(members)[:count])
    out = np.zeros(len(holdings.labels), bool)
    out[np.concatenate(held)] = True
    return (
        holdings._replace(images=holdings.images[~out], labels=holdings.labels[~out]),
        holdings._replace(images=holdings.images[out], labels=holdings.labels[out]),
    )


def accuracy(run: Run, held: Holdings, variables: dict) -> float:
    """Returns the share of the held-out images that the model with these variables gets right, in evaluation mode."""
    predict = _predictor(held.module, run.mesh, run.options.eval_batch_size)
    return float(np.mean(predict(variables, held.images) == held.labels))


@functools.lru_cache(maxsize=1)
def _predictor(module: nn.Module, mesh: Mesh, batch_size: int) -> Predictor:
    """A predictor is compiled once for all candidates of a defense."""
    return Predictor(module, mesh, batch_size)


def strongest(accuracies: Sequence[float], before: float, budget: float) -> int:
    """Returns which candidate a defender takes: the strongest that its own clean images do not speak against.

    A defender cannot see how much of a backdoor is left, but every defense has a dial that trades it against clean
    accuracy: a threshold, a learning rate, a weight. All of them are turned by this one rule.

    Args:
        accuracies: Of the candidates on the held-out images, from the weakest to the strongest.
        before: Of the suspect model.
        budget: How much may be lost, such as 0.02.

    Returns:
        The last one within the budget; the one that lost least (the stronger of equals) where none is.
    """
    within = [i for i, value in enumerate(accuracies) if value >= before - budget]
    best = [i for i, value in enumerate(accuracies) if value == max(accuracies)]
    return (within or best)[-1]
