"""PBE: progressive backdoor erasing, for a defender who has the suspect training set and no clean images.

    S_1 = a random share of the suspect training set
    round r:  f_r = AFT of f_{r-1} on S_r (f_0 the suspect model)
              score(x) = cos(logits of f_0 at x, logits of f_r at x)
              S_{r+1} = the share keep_r of the suspect set with the highest score

An image that carries the trigger changes its prediction when the backdoor goes, so that its score falls: each round's
subset holds fewer poisoned images than the one before. The first round sees adversarial examples alone, the later ones
for their first epoch. These are AFT's (`aft_jax.defenses.aft`): by PGD alone BadNets' patch is never unlearned, and its
images, of which the model is surest, come out as the most consistent ones (docs/results).

Source: Mu et al., "Progressive Backdoor Erasing via Connecting Backdoor and Adversarial Attacks" (CVPR 2023). Needs:
the suspect model and its training set, whose labels may be wrong. Costs: AFT on ever larger shares of the training set,
and after each round a pass over all of it.
"""

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from aft_jax.defenses import aft
from aft_jax.defenses.aft_step import Recipe
from aft_jax.defenses.defender import Holdings
from aft_jax.models import logits_function
from aft_jax.prediction import Batched
from aft_jax.randomness import generator_for
from aft_jax.training.loop import Run


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


def purify(run: Run, stage: str, holdings: Holdings, config: ml_collections.ConfigDict) -> Erased:
    """Returns the suspect model after all rounds.

    Args:
        run: The experiment.
        stage: The name of its checkpoints and metrics.
        holdings: The defender's: here the images and labels are the suspect training set.
        config: The resolved config; `config.pbe` has the recipe.
    """
    options = config.pbe
    size = len(holdings.labels)
    logits = Batched(partial(_logits, holdings), holdings.module, run.mesh, run.options.eval_batch_size)
    started = time.monotonic()
    before = logits(holdings.variables, holdings.images)
    scoring = time.monotonic() - started

    order = generator_for(run.seed, f'{stage}/first').permutation(size).astype(np.int32)
    subset = np.sort(order[: _count(options.first_share, size)])
    subsets, scores = [subset], []
    training = 0.0
    current = holdings
    for number, keep in enumerate((*options.keep, None), start=1):
        fitted = _round(run, f'{stage}/round{number}', current, subset, config, first=number == 1)
        training += fitted.seconds
        current = holdings._replace(variables=fitted.state.variables)
        started = time.monotonic()
        scores.append(consistency(before, logits(current.variables, holdings.images)))
        scoring += time.monotonic() - started
        if keep is not None:
            subset = most_consistent(scores[-1], _count(keep, size))
            subsets.append(subset)
    return Erased(fitted.state, training + scoring, tuple(subsets), tuple(scores))


def consistency(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Returns the cosine [N] of two models' logits [N, K] for the same images; 0 where either vanishes."""
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    products = np.sum(before * after, axis=1)
    return np.where(lengths > 0, products / np.where(lengths > 0, lengths, 1), 0).astype(np.float32)


def most_consistent(scores: np.ndarray, count: int) -> np.ndarray:
    """Returns the int32 indices, rising, of the `count` highest scores; of equals the first."""
    return np.sort(np.argsort(-scores, kind='stable')[:count]).astype(np.int32)


def _count(share: float, size: int) -> int:
    return max(1, round(share * size))


def _logits(holdings: Holdings, variables: dict, images: jax.Array) -> jax.Array:
    return logits_function(holdings.module, variables)(images)


def _round(
    run: Run, stage: str, current: Holdings, subset: np.ndarray, config: ml_collections.ConfigDict, first: bool
) -> Any:
    """One round of AFT on a subset, from the model as the round before left it."""
    options = config.pbe
    recipe = Recipe(
        aft.pgd_of(options),
        options.adversarial_share,
        distillation=0.0,
        augment=config.augment,
        families=aft.families_of(options, current.images.shape[1:]),
        renew_every=options.renew_every,
    )
    part = current._replace(images=current.images[subset], labels=current.labels[subset])
    return aft.train(run, stage, part, options, config, recipe, options.epochs if first else options.adversarial_epochs)
