"""PBE: progressive backdoor erasing, for a defender who has the untrusted training set and no clean images.

    S_1 = a random share of the training set, with equally many images of every label
    f_1 = the infected model f_0, fine-tuned on adversarial examples of S_1 alone
    round r:  score(x) = cos(logits of f_0 at x, logits of f_{r-1} at x)
              S_r = the share keep_r of the training set: equally many images of every label, those with the highest
                    scores
              f_r = AFT (`aft_jax.defenses.aft_universal`) of f_0 on S_r

The prediction on an image with the trigger changes when the backdoor is erased, so its score falls. Each round's subset
therefore has fewer poisoned images than the one before. f_r of the last round is the purified model.

Source: Mu et al., "Progressive Backdoor Erasing via Connecting Backdoor and Adversarial Attacks" (CVPR 2023). Three
things differ from the paper (docs/results has the effect of each):

- The paper takes the highest scores whatever their labels. Equally many images of every label work better for two
  reasons. Whole classes of clean images are less consistent than others, and would be lost. And if the attacker gives
  all poisoned images one label, that label is the most frequent one, so fewer of its images are taken.
- In the paper a round continues from the model of the round before, and trains on hard labels of mostly clean images:
  the few remaining poisoned images teach the backdoor again. AFT of the infected model has adversarial examples in
  every batch. It changes the predictions on clean images so little that poisoned ones stand out.
- The adversarial examples are those of our AFT. PGD alone never erases BadNets' patch: the model is most certain of
  these images, and they get the highest scores.

Needs: the infected model and its training set, whose labels may be wrong. Costs: AFT on growing shares of the training
set, and after each round a pass over all of it.
"""

import time
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from aft_jax.defenses import aft_universal
from aft_jax.defenses.aft_universal_options import UniversalAftOptions
from aft_jax.defenses.defender import DefenderData, DefenseSettings, PoisonScores, Purified
from aft_jax.models import logits_function
from aft_jax.randomness import generator_for
from aft_jax.training.prediction import BatchedFunction
from aft_jax.training.stage import Run


class PbeOptions(NamedTuple):
    """Section `pbe` of the config.

    Attributes:
        aft: Options of AFT in the rounds after the first; the section has their fields beside those below.
        first_share: Share of the training set in the first round.
        first_epochs: Length of the first round.
        first_learning_rate: Learning rate of the first round.
        keep: Share of the training set in each further round.
    """

    aft: UniversalAftOptions
    first_share: float
    first_epochs: float
    first_learning_rate: float
    keep: tuple[float, ...]


def purify(run: Run, name: str, data: DefenderData, settings: DefenseSettings) -> Purified:
    """Does all rounds.

    Args:
        run: Experiment.
        name: Name of the defense. Each round has a name of its own below it.
        data: Infected model and the untrusted training set.
        settings: Settings with `PbeOptions`.
    """
    options: PbeOptions = settings.options
    size = len(data.labels)
    started = time.monotonic()
    logits = BatchedFunction(partial(logits_of, data.module), data.module, run.mesh, run.options.eval_batch_size)
    logits_before = logits(data.variables, data.images)
    seconds = time.monotonic() - started

    draws = generator_for(run.seed, f'{name}/first').permutation(size)
    subset = highest_by_label(draws, data.labels, _count(options.first_share, size))
    subsets, scores = [subset], []
    for number, keep in enumerate((*options.keep, None), start=1):
        part = data._replace(images=data.images[subset], labels=data.labels[subset])
        round_options = first_round(options) if number == 1 else options.aft
        purified = aft_universal.purify(run, f'{name}/round{number}', part, settings._replace(options=round_options))
        started = time.monotonic()
        scores.append(consistency(logits_before, logits(purified.variables, data.images)))
        seconds += purified.seconds + time.monotonic() - started
        if keep is not None:
            subset = highest_by_label(scores[-1], data.labels, _count(keep, size))
            subsets.append(subset)
    return Purified(purified.variables, seconds, PoisonScores(tuple(subsets), tuple(scores)))


def first_round(options: PbeOptions) -> UniversalAftOptions:
    """Selects the options of the first round, which trains on adversarial examples alone.

    Distillation would pass on the backdoor: many of its images are still poisoned.
    """
    return options.aft._replace(
        epochs=options.first_epochs,
        adversarial_epochs=options.first_epochs,
        learning_rate=options.first_learning_rate,
        adversarial_share=1.0,
        adversarial_weight=1.0,
        distillation=0.0,
        cutmix=0.0,
        recalibrate=False,
    )


def logits_of(module: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
    """Computes the logits [B, K] of images in evaluation mode."""
    return logits_function(module, variables)(images)


def consistency(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Computes the cosine [N] of two models' logits [N, K] for the same images; 0 if either is all zero."""
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    products = np.sum(before * after, axis=1)
    return np.where(lengths > 0, products / np.where(lengths > 0, lengths, 1), 0).astype(np.float32)


def highest_by_label(scores: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Selects `count` images, equally many of every label: those with the highest scores.

    All images of a label are taken if it has too few, and more of the other labels. Of equal scores the first is taken.

    Args:
        scores: Score of each image, [N].
        labels: int32 [N].
        count: Number of images.

    Returns:
        int32 indices in ascending order.
    """
    present, sizes = np.unique(labels, return_counts=True)
    selected: list[np.ndarray] = []
    left = count
    for i, rarest in enumerate(np.argsort(sizes, kind='stable')):
        members = np.flatnonzero(labels == present[rarest])
        best = np.argsort(-scores[members], kind='stable')[: round(left / (len(present) - i))]
        selected.append(members[best])
        left -= len(best)
    return np.sort(np.concatenate(selected)).astype(np.int32)


def _count(share: float, size: int) -> int:
    return max(1, round(share * size))
