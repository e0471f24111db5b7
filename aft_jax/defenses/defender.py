"""Interface of a defense, and what all defenses share: their data, their start, and the rule by which they choose."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import numpy as np
import optax

from aft_jax.data.augment import AugmentOptions
from aft_jax.errors import UserError
from aft_jax.models.head import HeadPath, find_head
from aft_jax.randomness import generator_for
from aft_jax.training import optimiser, state
from aft_jax.training.optimiser import TrainOptions
from aft_jax.training.prediction import Predictor
from aft_jax.training.stage import Fitted, Run


class DefenderData(NamedTuple):
    """All that a defender knows.

    Attributes:
        module: Architecture of the classifier.
        variables: Variables of the infected model.
        images: uint8 [N, H, W, C], clean images or the untrusted training set (`Defense.trains_on`).
        labels: int32 [N]. In an untrusted training set they may be wrong.
    """

    module: nn.Module
    variables: dict
    images: np.ndarray
    labels: np.ndarray

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays from which the training loop takes batches."""
        return {'images': self.images, 'labels': self.labels}


class TuningOptions(NamedTuple):
    """Section `tuning` of the config.

    Attributes:
        held_out_share: Share of the clean images on which candidates are compared.
        budget: Accuracy below the best candidate's that is allowed, such as 0.02.
    """

    held_out_share: float
    budget: float


class DefenseSettings(NamedTuple):
    """All that a defense may read of the config: nothing of the attack.

    Attributes:
        options: Section of the defense, an instance of its `Defense.options`.
        batch_size: Images in a step.
        train: Options with which the infected model was trained. Defenses take momentum and weight decay from here.
        augment: Augmentation with which the infected model was trained.
        tuning: Options of the choice among candidates.
    """

    options: Any
    batch_size: int
    train: TrainOptions
    augment: AugmentOptions
    tuning: TuningOptions


class PoisonScores(NamedTuple):
    """Judgement of a defense about each image of the untrusted training set, one entry for each round.

    Attributes:
        subsets: int32, indices of the images on which the round trained.
        scores: float32 [N]. A high score means that the image seems clean.
    """

    subsets: tuple[np.ndarray, ...]
    scores: tuple[np.ndarray, ...]


class Purified(NamedTuple):
    """Result of a defense.

    Attributes:
        variables: Variables of the purified model.
        seconds: Wall-clock time of all starts together.
        poison_scores: Judgement about the training images, from a defense that trains on the untrusted training set.
    """

    variables: dict
    seconds: float
    poison_scores: PoisonScores | None = None


class Defense(NamedTuple):
    """Entry of DEFENSES.

    Attributes:
        purify: Function of (run, name of its checkpoints and metrics, data, settings).
        options: NamedTuple with the fields of the defense's config section.
        trains_on: Images that the defender holds.
        needs_feature_maps: Whether the classifier must return feature maps, which a user's own module need not.
        needs_head: Whether the classifier must end with a dense layer, which a user's own module need not.
    """

    purify: Callable[[Run, str, DefenderData, DefenseSettings], Purified]
    options: type
    trains_on: Literal['clean_images', 'untrusted_training_set'] = 'clean_images'
    needs_feature_maps: bool = False
    needs_head: bool = False


def require_head(name: str, module: nn.Module, image_shape: tuple[int, ...]) -> HeadPath:
    """Finds the head of a classifier for a defense that replaces it.

    Args:
        name: Name of the defense.
        module: Classifier.
        image_shape: (H, W, C).

    Raises:
        UserError: The classifier does not end with a dense layer.
    """
    head = find_head(module, image_shape)
    if head is None:
        raise UserError(
            f'the defense {name!r} replaces the last nn.Dense of a network, but that of {type(module).__name__} does '
            f'not give the logits; end the network with an nn.Dense, or leave {name!r} out.'
        )
    return head


def start_training(
    data: DefenderData,
    settings: DefenseSettings,
    steps: int,
    learning_rate: float,
    *,
    schedule: str | None = None,
) -> tuple[state.TrainState, optax.GradientTransformation]:
    """Creates the infected model's state before the first step, and the optimiser.

    Args:
        data: Data with the infected model.
        settings: Settings whose options have `max_grad_norm`, and `schedule` unless that is an argument.
        steps: Length of the training.
        learning_rate: Learning rate of the first step; with 'one_cycle' the largest one.
        schedule: Schedule of the learning rate; None for that of the options.
    """
    sgd = optimiser.sgd(
        learning_rate,
        settings.options.schedule if schedule is None else schedule,
        steps,
        momentum=settings.train.momentum,
        weight_decay=settings.train.weight_decay,
        max_grad_norm=settings.options.max_grad_norm,
    )
    return state.create(data.variables, sgd), sgd


def hold_out(data: DefenderData, share: float, seed: int) -> tuple[DefenderData, DefenderData]:
    """Splits the data: most images train a defense, the held-out ones compare its candidates.

    Args:
        data: Clean images.
        share: Held-out share of each class, rounded. A class of two images or more has images on both sides.
        seed: Seed of the experiment.

    Returns:
        The data to train on, and the held-out data.

    Raises:
        UserError: No class has two images.
    """
    generator = generator_for(seed, 'purify/held_out')
    indices = []
    for label in np.unique(data.labels):
        members = np.flatnonzero(data.labels == label)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        indices.append(generator.permutation(members)[:count])
    if not sum(map(len, indices)):
        raise UserError('no class has two clean images, of which one could be held out; raise clean_share.')
    held_out = np.zeros(len(data.labels), bool)
    held_out[np.concatenate(indices)] = True
    return (
        data._replace(images=data.images[~held_out], labels=data.labels[~held_out]),
        data._replace(images=data.images[held_out], labels=data.labels[held_out]),
    )


def strongest(accuracies: Sequence[float], budget: float) -> int:
    """Chooses the strongest candidate whose accuracy on clean images is within the budget.

    A defender cannot see how much of a backdoor is left. Every defense has a parameter that trades the backdoor against
    clean accuracy: a threshold, a learning rate, a place on a curve. All defenses choose it by this rule. Candidates
    are compared with the best of them, not with the infected model, which may have memorised the held-out images.

    Args:
        accuracies: Accuracies of the candidates on the held-out images, from the weakest candidate to the strongest.
        budget: Accuracy below the best candidate's that is allowed, such as 0.02.

    Returns:
        Index of the last candidate within the budget.
    """
    return max(i for i, value in enumerate(accuracies) if value >= max(accuracies) - budget)


class Choice(NamedTuple):
    """Candidate that `choose` took.

    Attributes:
        chosen: Index of the candidate.
        accuracy: Accuracy of the candidate on the held-out images.
        seconds: Wall-clock time of the choice.
    """

    chosen: int
    accuracy: float
    seconds: float


def choose(run: Run, held: DefenderData, candidates: Iterable[dict], tuning: TuningOptions) -> Choice:
    """Measures candidates on the held-out images, and takes the `strongest`.

    Args:
        run: Experiment.
        held: Held-out data.
        candidates: Variables of the candidates, from the weakest to the strongest. An iterator keeps one in memory.
        tuning: Options of the choice.
    """
    started = time.monotonic()
    predict = Predictor(held.module, run.mesh, run.options.eval_batch_size)
    accuracies = [float(np.mean(predict(variables, held.images) == held.labels)) for variables in candidates]
    chosen = strongest(accuracies, tuning.budget)
    return Choice(chosen, accuracies[chosen], time.monotonic() - started)


def choose_fitted(run: Run, held: DefenderData, candidates: Sequence[Fitted], tuning: TuningOptions) -> Purified:
    """Takes the `strongest` of trained candidates; its seconds are those of all of them and of the choice."""
    choice = choose(run, held, (fitted.state.variables for fitted in candidates), tuning)
    seconds = sum(fitted.seconds for fitted in candidates) + choice.seconds
    return Purified(candidates[choice.chosen].state.variables, seconds)


def tune(
    run: Run,
    name: str,
    data: DefenderData,
    train: Callable[[str, DefenderData, float], Fitted],
    settings: DefenseSettings,
) -> Purified:
    """Trains a candidate for each of `options.learning_rates`, from the lowest, and takes the `strongest`.

    A share of the data is held out for the choice. A single learning rate needs no choice and trains on all data.

    Args:
        run: Experiment.
        name: Name of the only candidate's training. Each of several candidates has a name of its own below it.
        data: Clean images.
        train: Function of (name, data to train on, learning rate).
        settings: Settings whose options have `learning_rates`.
    """
    rates = settings.options.learning_rates
    if len(rates) == 1:
        fitted = train(name, data, rates[0])
        return Purified(fitted.state.variables, fitted.seconds)
    kept, held = hold_out(data, settings.tuning.held_out_share, run.seed)
    return choose_fitted(run, held, [train(f'{name}/{float(rate)}', kept, rate) for rate in rates], settings.tuning)
