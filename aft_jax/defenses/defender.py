"""What every defender holds, how it begins, and how it tunes itself on nothing but its clean images."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from aft_jax.errors import UserError
from aft_jax.randomness import generator_for
from aft_jax.training import optimiser, state
from aft_jax.training.loop import Fitted, Run
from aft_jax.training.prediction import Predictor


class DefenderData(NamedTuple):
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
    data: DefenderData,
    options: ml_collections.ConfigDict,
    train: ml_collections.ConfigDict,
    steps: int,
    learning_rate: float | None = None,
) -> tuple[state.TrainState, optax.GradientTransformation]:
    """Returns the suspect model as a state before its first step, and the optimiser.

    Args:
        data: The defender's.
        options: The defense's own config: schedule, and perhaps learning_rate and max_grad_norm.
        train: `config.train`, for momentum and weight_decay.
        steps: Length of the defense.
        learning_rate: In place of that of the options.
    """
    sgd = optimiser.sgd(
        options.learning_rate if learning_rate is None else learning_rate,
        options.schedule,
        steps,
        train.momentum,
        train.weight_decay,
        options.get('max_grad_norm', 0.0),
    )
    return state.create(data.variables, sgd), sgd


def hold_out(data: DefenderData, share: float, seed: int) -> tuple[DefenderData, DefenderData]:
    """Returns the data in two: what a defense trains on, and what it tells apart its candidates by.

    Args:
        data: All of the defender's.
        share: Of each class, rounded, that is held out; every class of two images or more gives and keeps one.
        seed: The experiment's.

    Raises:
        UserError: No class has two images.
    """
    generator = generator_for(seed, 'purify/held_out')
    held = []
    for label in np.unique(data.labels):
        members = np.flatnonzero(data.labels == label)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.append(generator.permutation(members)[:count])
    if not sum(map(len, held)):
        raise UserError('no class has two clean images, of which one could be held out; raise clean_share.')
    out = np.zeros(len(data.labels), bool)
    out[np.concatenate(held)] = True
    return (
        data._replace(images=data.images[~out], labels=data.labels[~out]),
        data._replace(images=data.images[out], labels=data.labels[out]),
    )


def accuracy(run: Run, held: DefenderData, variables: dict) -> float:
    """Returns the share of the held-out images that the model with these variables gets right, in evaluation mode."""
    predict = _predictor(held.module, run.mesh, run.options.eval_batch_size)
    return float(np.mean(predict(variables, held.images) == held.labels))


@functools.lru_cache(maxsize=1)
def _predictor(module: nn.Module, mesh: Mesh, batch_size: int) -> Predictor:
    """A predictor is compiled once for all candidates of a defense."""
    return Predictor(module, mesh, batch_size)


def strongest(accuracies: Sequence[float], budget: float) -> int:
    """Returns which candidate a defender takes: the strongest that its own clean images do not speak against.

    A defender cannot see how much of a backdoor is left, but every defense has a dial that trades it against clean
    accuracy: a threshold, a learning rate, a place on a curve. All of them are turned by this one rule. Candidates are
    compared with the best of them and not with the suspect model, which may know the held-out images by heart.

    Args:
        accuracies: Of the candidates on the held-out images, from the weakest to the strongest.
        budget: How much less than the best of them is allowed, such as 0.02.

    Returns:
        The last one within the budget.
    """
    return max(i for i, value in enumerate(accuracies) if value >= max(accuracies) - budget)


def tune(
    run: Run,
    stage: str,
    data: DefenderData,
    dial: Sequence[float],
    train: Callable[[str, DefenderData, float], Fitted],
    tuning: ml_collections.ConfigDict,
) -> Fitted:
    """Trains a candidate for every setting of a dial and returns the one that `strongest` takes.

    Args:
        run: The experiment.
        stage: The name of the only candidate's stage; of several, each has one of its own below it.
        data: The defender's; a share is held out for the choice, and trains nothing, unless there is no choice.
        dial: The settings, from the weakest to the strongest.
        train: (name of the stage, data to train on, setting) -> what came out.
        tuning: `config.tuning`.

    Returns:
        The chosen one, with the seconds that all of them and the choice took.
    """
    if len(dial) == 1:
        return train(stage, data, dial[0])
    kept, held = hold_out(data, tuning.held_out_share, run.seed)
    return choose(run, held, [train(f'{stage}/{float(setting)}', kept, setting) for setting in dial], tuning)


def choose(run: Run, held: DefenderData, candidates: Sequence[Fitted], tuning: ml_collections.ConfigDict) -> Fitted:
    """Returns the candidate that `strongest` takes, with the seconds of all; arguments as for `tune`."""
    started = time.monotonic()
    chosen = strongest([accuracy(run, held, one.state.variables) for one in candidates], tuning.budget)
    seconds = sum(one.seconds for one in candidates) + time.monotonic() - started
    return candidates[chosen]._replace(seconds=seconds)
