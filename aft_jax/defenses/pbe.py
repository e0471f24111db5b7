"""PBE: progressive backdoor erasing, for a defender who has the suspect training set and no clean images.

    S_1 = a random share of the suspect training set, from every label as many
    f_1 = the suspect model f_0, fine-tuned on adversarial examples of S_1 alone
    round r:  score(x) = cos(logits of f_0 at x, logits of f_{r-1} at x)
              S_r = the share keep_r of the suspect set: of every label as many, those with the highest score
              f_r = AFT (`aft_jax.defenses.aft`) of f_0 on S_r

An image that carries the trigger changes its prediction when the backdoor goes, so that its score falls: each round's
subset holds fewer poisoned images than the one before. f_r of the last round is the purified model.

Source: Mu et al., "Progressive Backdoor Erasing via Connecting Backdoor and Adversarial Attacks" (CVPR 2023). Three
things are not as there (docs/results has what each of them does):

- The paper takes the highest scores whatever their labels. As many of every label do better twice: whole classes of
  clean images are less consistent than others, and are not lost; and an attacker who gives poisoned images one label
  makes it the most frequent one, so that fewer of them are taken.
- A round goes on from the model of the round before there, and trains on hard labels, clean images for the most part:
  the few poisoned images that are left teach the backdoor again. AFT from the suspect model has adversarial examples in
  every batch, and changes the predictions on clean images so little that poisoned ones stand out.
- The adversarial examples are those of our AFT: by PGD alone BadNets' patch is never unlearned, and its images, of
  which the model is surest, come out as the most consistent ones.

Needs: the suspect model and its training set, whose labels may be wrong. Costs: AFT on ever larger shares of the
training set, and after each round a pass over all of it.
"""

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from aft_jax.defenses import aft
from aft_jax.defenses.defender import DefenderData
from aft_jax.models import logits_function
from aft_jax.randomness import generator_for
from aft_jax.training.loop import Fitted, Run
from aft_jax.training.prediction import Batched


class Erased(NamedTuple):
    """What PBE ends with.

    Attributes:
        state: The purified model's, with its `variables`.
        seconds: Wall-clock time of all rounds, scoring included.
        subsets: int32 indices into the suspect training set, on which each round trained.
        scores: float32 [N] of each round: the higher, the more the image's prediction has stayed.
    """

    state: Any
    seconds: float
    subsets: tuple[np.ndarray, ...]
    scores: tuple[np.ndarray, ...]


def purify(run: Run, stage: str, data: DefenderData, config: ml_collections.ConfigDict) -> Erased:
    """Returns the suspect model after all rounds.

    Args:
        run: The experiment.
        stage: The name of its checkpoints and metrics.
        data: The defender's: here the images and labels are the suspect training set.
        config: The resolved config; `config.pbe` has the recipe.
    """
    options = config.pbe
    size = len(data.labels)
    logits = Batched(partial(_logits, data), data.module, run.mesh, run.options.eval_batch_size)
    started = time.monotonic()
    before = logits(data.variables, data.images)
    scoring = time.monotonic() - started

    draws = generator_for(run.seed, f'{stage}/first').permutation(size)
    subset = highest_by_label(draws, data.labels, _count(options.first_share, size))
    subsets, scores = [subset], []
    training = 0.0
    for number, keep in enumerate((*options.keep, None), start=1):
        part = data._replace(images=data.images[subset], labels=data.labels[subset])
        erase = _on_adversarial_examples if number == 1 else partial(aft.purify, section='pbe')
        fitted = erase(run, f'{stage}/round{number}', part, config)
        training += fitted.seconds
        started = time.monotonic()
        scores.append(consistency(before, logits(fitted.state.variables, data.images)))
        scoring += time.monotonic() - started
        if keep is not None:
            subset = highest_by_label(scores[-1], data.labels, _count(keep, size))
            subsets.append(subset)
    return Erased(fitted.state, training + scoring, tuple(subsets), tuple(scores))


def consistency(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Returns the cosine [N] of two models' logits [N, K] for the same images; 0 where either vanishes."""
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    products = np.sum(before * after, axis=1)
    return np.where(lengths > 0, products / np.where(lengths > 0, lengths, 1), 0).astype(np.float32)


def highest_by_label(scores: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Returns the int32 indices, rising, of `count` images, from every label as many: those with its highest scores.

    A label that has too few images gives all of them, and the others give more. Of equal scores the first is taken.
    """
    present, sizes = np.unique(labels, return_counts=True)
    taken: list[np.ndarray] = []
    left = count
    for i, rarest in enumerate(np.argsort(sizes, kind='stable')):
        members = np.flatnonzero(labels == present[rarest])
        best = np.argsort(-scores[members], kind='stable')[: round(left / (len(present) - i))]
        taken.append(members[best])
        left -= len(best)
    return np.sort(np.concatenate(taken)).astype(np.int32)


def _count(share: float, size: int) -> int:
    return max(1, round(share * size))


def _logits(data: DefenderData, variables: dict, images: jax.Array) -> jax.Array:
    return logits_function(data.module, variables)(images)


def _on_adversarial_examples(run: Run, stage: str, part: DefenderData, config: ml_collections.ConfigDict) -> Fitted:
    """The first round. What the suspect predicts for clean images would hold the backdoor: many are poisoned yet."""
    options = config.pbe.copy_and_resolve_references()
    options.epochs, options.learning_rate = options.first_epochs, options.first_learning_rate
    recipe = aft.recipe_of(options, config.augment, part.images.shape[1:])
    recipe = recipe._replace(adversarial_share=1.0, adversarial_weight=1.0, distillation=0.0, cutmix=0.0)
    return aft.train(run, stage, part, options, config, recipe, options.epochs)
