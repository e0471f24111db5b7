"""Scores whether a model is infected, from the model and clean images alone: no trigger, target or benign model.

The classes that untargeted adversarial examples end up in (`landing`) reveal strong triggers. This alone is not enough:
a benign model also has classes that attract their neighbours, and a small or dark trigger is only a small part of any
single perturbation. A backdoor differs in that *one* perturbation moves every image to its target label. So the
perturbations d_i = PGD(x_i) - x_i of half of the images are averaged within each class, and then over the classes.
The average cancels what is specific to single images. It is applied to the other half of the images as

    u_p = strength * sign(m) |m|^p / rms(sign(m) |m|^p),     m = mean_y mean_{i: y_i = y} d_i,     p = 0, 1, 2, 3

Among all perturbations u of the same size in the norm q = 1 + 1/p, u_p has the largest <m, u>. With p = 0 (q infinite)
all pixels change equally. A larger p (q towards 1) changes fewer pixels, as a patch does.

    all2one  max over c of the mean over the other classes y of moved[y, c]
    all2all  1/K times the sum over c of max over y of moved[y, c], where only the largest entry of each row y counts:
             each class moves to one class, and no two classes to the same one

moved[y, c] is the share of the correctly classified images of class y that the perturbation moves to class c.
The score is the larger of the two, maximised over p, in 0..1. It is near 0 for a benign model, and near the attack
success rate where the shared perturbation works as well as the trigger.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aft_jax.analysis.probe import ModelProbe
from aft_jax.models import logits_function
from aft_jax.training.prediction import BatchedFunction, float_images

# Size of the perturbations that are averaged, as a root mean square over the image.
EPS = 8 / 255
# Root mean square of the shared perturbation, similar to triggers (Blend's noise 0.05, SIG 0.055, BadNets' patch 0.08).
STRENGTH = 0.05
# The powers p.
POWERS = (0, 1, 2, 3)
# Sizes (Linf) of the untargeted adversarial examples whose landing is reported.
LANDING_EPS = tuple(n / 255 for n in (2, 4, 8, 16, 32))
ONE, ALL = 'all2one', 'all2all'


class BackdoorHypothesis(NamedTuple):
    """The backdoor that explains best how images move between classes.

    Attributes:
        score: Share of images that move as the backdoor would move them, in 0..1.
        kind: Kind of the backdoor, 'all2one' or 'all2all', whichever has the higher score.
        target_map: Suspected target label for each true label, int32 [K].
    """

    score: float
    kind: str
    target_map: np.ndarray


class InfectionScore(NamedTuple):
    """Result of scoring a model.

    Attributes:
        hypothesis: Backdoor hypothesis from the best shared perturbation.
        moved: Share of each true class that this perturbation moves to each other class, float64 [K, K].
        perturbation: Shared perturbation, from one half of the images, float32 [H, W, C].
        crowding: Backdoor hypothesis from the classes that single adversarial examples end up in, as in the paper's
            observation; the one with the highest score over eps.
        landing_eps: Sizes E of the adversarial examples (Linf).
        landing: Number of fooling examples of each true class that end up in each other class, by eps, int64 [E, K, K].
    """

    hypothesis: BackdoorHypothesis
    moved: np.ndarray
    perturbation: np.ndarray
    crowding: BackdoorHypothesis
    landing_eps: tuple[float, ...]
    landing: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        """Converts the result to plain values for results.json, without the pixels of the perturbation."""
        return {
            'score': round(self.hypothesis.score, 6),
            'kind': self.hypothesis.kind,
            'suspected': self.hypothesis.target_map.tolist(),
            'crowding': round(self.crowding.score, 6),
            'moved': np.round(self.moved, 6).tolist(),
            'landing_eps': list(self.landing_eps),
            'landing': self.landing.tolist(),
        }


class Scorer:
    """Computes the infection scores of models of one architecture."""

    def __init__(self, probe: ModelProbe, module: nn.Module, mesh: Mesh, batch_size: int):
        """Creates a scorer for one architecture.

        Args:
            probe: Compiled functions for the architecture.
            module: Architecture.
            mesh: Devices.
            batch_size: Images per call, rounded up to a multiple of the number of devices.
        """
        self._probe = probe
        self._predict_perturbed = BatchedFunction(partial(_predict_perturbed, module), module, mesh, batch_size)

    def score(
        self,
        variables: dict,
        images: np.ndarray,
        labels: np.ndarray,
        num_classes: int,
        landing_eps: tuple[float, ...] = LANDING_EPS,
    ) -> InfectionScore:
        """Computes the infection score of a model.

        Args:
            variables: Variables of the model.
            images: Clean images [N, H, W, C] in random order, uint8, or float32 in [0, 1]; 20 per class are enough.
            labels: True labels, int32 [N].
            num_classes: Number of classes K.
            landing_eps: Sizes (Linf) of the adversarial examples whose landing is reported.
        """
        landing = np.zeros((len(landing_eps), num_classes, num_classes), np.int64)
        for i, eps in enumerate(landing_eps):
            examples = self._probe.adversarial(variables, images, labels, 'linf', eps)
            landing[i] = count_moves(labels, self._probe.predict(variables, examples), num_classes)

        correct = self._probe.predict(variables, images) == labels
        differences = self._probe.adversarial(variables, images, labels, 'l2', EPS) - float_images(images)
        halves = np.arange(len(images)) % 2
        predictions = np.zeros((len(images), len(POWERS)), np.int32)
        for half in (0, 1):
            members, others = halves == half, halves != half
            perturbations = shared_perturbations(differences[others], labels[others])
            arguments = {'model': dict(variables), 'perturbations': perturbations}
            predictions[members] = self._predict_perturbed(arguments, images[members])
        moved = [share_moved(labels[correct], column[correct], num_classes) for column in predictions.T]
        hypotheses = [classify_confusions(shares) for shares in moved]
        best = max(range(len(POWERS)), key=lambda i: hypotheses[i].score)
        landing_shares = landing / np.maximum(landing.sum(axis=2, keepdims=True), 1)
        return InfectionScore(
            hypotheses[best],
            moved[best],
            perturbations[best],
            max((classify_confusions(shares) for shares in landing_shares), key=lambda hypothesis: hypothesis.score),
            tuple(landing_eps),
            landing,
        )


def shared_perturbations(differences: np.ndarray, labels: np.ndarray, strength: float = STRENGTH) -> np.ndarray:
    """Computes the perturbations u_p that adversarial perturbations share, float32 [P, H, W, C], one per power.

    Args:
        differences: Adversarial example minus image, [N, H, W, C].
        labels: True labels, int [N]. Each class has the same weight in the average, whatever its number of images.
        strength: Root mean square of each u_p, before values are clipped to [-1, 1].
    """
    average = np.mean([differences[labels == y].mean(axis=0, dtype=np.float64) for y in np.unique(labels)], axis=0)
    largest = np.abs(average).max()
    if largest == 0:
        return np.zeros((len(POWERS), *average.shape), np.float32)
    relative = average / largest
    shapes = np.stack([np.sign(relative) * np.abs(relative) ** power for power in POWERS])
    size = np.sqrt(np.square(shapes).mean(axis=(1, 2, 3), keepdims=True))
    return np.clip(strength * shapes / size, -1, 1).astype(np.float32)


def count_moves(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts the images of each true class that are classified as each other class, int64 [K, K]."""
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (labels, predictions), 1)
    np.fill_diagonal(counts, 0)
    return counts


def share_moved(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Computes the share of each true class that is classified as each other class, float64 [K, K].

    A class without images has shares of 0.
    """
    sizes = np.bincount(labels, minlength=num_classes)
    return count_moves(labels, predictions, num_classes) / np.maximum(sizes, 1)[:, None]


def classify_confusions(shares: np.ndarray) -> BackdoorHypothesis:
    """Decides which kind of backdoor explains a matrix of confusions best.

    Args:
        shares: Share of each true class that moves to each other class, float64 [K, K], zero on the diagonal.
    """
    size = len(shares)
    all2one = shares.sum(axis=0) / (size - 1)
    favourites = shares.argmax(axis=1)
    all2all = np.zeros(size)
    np.maximum.at(all2all, favourites, shares.max(axis=1))
    if all2one.max() >= all2all.mean():
        return BackdoorHypothesis(float(all2one.max()), ONE, np.full(size, all2one.argmax(), np.int32))
    return BackdoorHypothesis(float(all2all.mean()), ALL, favourites.astype(np.int32))


def _predict_perturbed(module: nn.Module, arguments: Any, images: jax.Array) -> jax.Array:
    """Predicts the classes, int32 [B, P], of the images with each of the perturbations [P, H, W, C]."""
    model = logits_function(module, arguments['model'])
    perturbations = arguments['perturbations']
    predictions = [model(jnp.clip(images + p[None], 0.0, 1.0)).argmax(axis=-1) for p in perturbations]
    return jnp.stack(predictions, axis=1).astype(jnp.int32)
