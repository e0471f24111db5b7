"""Is this model infected? A score from the model and clean images alone: no trigger, no target label, no benign model.

Where untargeted adversarial examples land tells of strong triggers (`landing`), but a benign model also has classes
that its neighbours fall into, and a trigger that covers few or dark pixels is a small part of any one adversarial
change. What sets a backdoor apart is that *one* change moves every image, and moves it where the labels are commanded.
So the changes d_i = PGD(x_i) - x_i of half of the images are averaged, class by class, which cancels what is each
image's own, and what they share is put on the other half:

    u_p = strength * sign(m) |m|^p / rms(sign(m) |m|^p),     m = mean_y mean_{i: y_i = y} d_i,     p = 0, 1, 2, 3

Among all changes u of the same size in the norm q = 1 + 1/p these have the largest <m, u>: p = 0 is a change of all
pixels alike (q infinite), and a larger p one of fewer pixels (q towards 1), which is what a patch is.

    all2one  max over c of the mean over the other classes y of moved[y, c]
    all2all  1/K times the sum over c of max over y of moved[y, c], where only the largest of each row y counts: each
             class goes to one class, and no two of them to the same

moved[y, c] is the share of images of class y, of those that the model gets right, that the change sends to class c.
The score is the larger of the two, over p: in 0..1, near 0 for a benign model, and near the attack success rate where
the shared change is as good as the trigger.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aft_jax.analysis.probe import Probe
from aft_jax.models import logits_function
from aft_jax.training.prediction import BatchedFunction

# Of the changes that are averaged, as a root mean square over the image.
EPS = 8 / 255
# Of the shared change, likewise: what triggers are made of (Blend's noise 0.05, SIG 0.055, BadNets' patch 0.08).
STRENGTH = 0.05
POWERS = (0, 1, 2, 3)
# Of the untargeted examples whose landing is reported.
LANDING_EPS = tuple(n / 255 for n in (2, 4, 8, 16, 32))
ONE, ALL = 'all2one', 'all2all'


class BackdoorHypothesis(NamedTuple):
    """What a [K, K] matrix of shares (true class, other class) says of a backdoor.

    Attributes:
        score: In 0..1.
        kind: 'all2one' or 'all2all', whichever it looks more like.
        target_map: int32 [K], the label that it suspects is commanded for each true class.
    """

    score: float
    kind: str
    target_map: np.ndarray


class InfectionScore(NamedTuple):
    """What is to be known of a suspect model.

    Attributes:
        hypothesis: From the shared change: the score, the kind of backdoor and the suspected labels.
        moved: float64 [K, K], the shares of each true class that the shared change moves to each other class.
        change: float32 [H, W, C], that shared change, from one half of the images.
        crowding: From where single adversarial examples land alone, the paper's observation; the strongest over eps.
        landing_eps: Of the adversarial examples (Linf).
        landing: int64 [E, K, K], how many fooling examples of each true class land in each other class, by eps.
    """

    hypothesis: BackdoorHypothesis
    moved: np.ndarray
    change: np.ndarray
    crowding: BackdoorHypothesis
    landing_eps: tuple[float, ...]
    landing: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values for results.json, without the change's pixels."""
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
    """Scores models of one architecture."""

    def __init__(self, probe: Probe, module: nn.Module, mesh: Mesh, batch_size: int):
        """Scores with a probe for `module`; `batch_size` as for `BatchedFunction`."""
        self._probe = probe
        self._changed = BatchedFunction(partial(_predict_changed, module), module, mesh, batch_size)

    def __call__(
        self,
        variables: dict,
        images: np.ndarray,
        labels: np.ndarray,
        num_classes: int,
        landing_eps: tuple[float, ...] = LANDING_EPS,
    ) -> InfectionScore:
        """Returns the score of a model.

        Args:
            variables: The model's.
            images: uint8 [N, H, W, C], clean, in random order; 20 a class are enough.
            labels: int32 [N], true.
            num_classes: K.
            landing_eps: Of the adversarial examples whose landing is reported.
        """
        landing = np.zeros((len(landing_eps), num_classes, num_classes), np.int64)
        for i, eps in enumerate(landing_eps):
            examples = self._probe.adversarial(variables, images, labels, 'linf', eps)
            landing[i] = count_moves(labels, self._probe.predict(variables, examples), num_classes)

        right = self._probe.predict(variables, images) == labels
        differences = self._probe.adversarial(variables, images, labels, 'l2', EPS) - images.astype(np.float32) / 255
        halves = np.arange(len(images)) % 2
        said = np.zeros((len(images), len(POWERS)), np.int32)
        for half in (0, 1):
            others = halves != half
            changes = shared_changes(differences[others], labels[others])
            said[halves == half] = self._changed({'model': dict(variables), 'changes': changes}, images[halves == half])
        moved = [share_moved(labels[right], column[right], num_classes) for column in said.T]
        suspicions = [suspect(shares) for shares in moved]
        best = max(range(len(POWERS)), key=lambda i: suspicions[i].score)
        crowding = [suspect(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)) for counts in landing]
        return InfectionScore(
            suspicions[best],
            moved[best],
            changes[best],
            max(crowding, key=lambda found: found.score),
            tuple(landing_eps),
            landing,
        )


def shared_changes(differences: np.ndarray, labels: np.ndarray, strength: float = STRENGTH) -> np.ndarray:
    """Returns the changes u_p that adversarial changes share, float32 [P, H, W, C], one a power.

    Args:
        differences: Adversarial example minus image, [N, H, W, C].
        labels: int [N]; each class has the same weight in the average, however many images it has.
        strength: The root mean square of each u_p, before what is larger than 1 is cut off.
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
    """Returns int64 [K, K]: how many images of each true class are predicted as each other class."""
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (labels, predictions), 1)
    np.fill_diagonal(counts, 0)
    return counts


def share_moved(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns float64 [K, K]: the share of each true class that is predicted as each other class; 0 without images."""
    sizes = np.bincount(labels, minlength=num_classes)
    return count_moves(labels, predictions, num_classes) / np.maximum(sizes, 1)[:, None]


def suspect(shares: np.ndarray) -> BackdoorHypothesis:
    """Returns which backdoor a matrix of shares looks like most.

    Args:
        shares: float64 [K, K], of true class and other class, zero on the diagonal.
    """
    size = len(shares)
    by_target = shares.sum(axis=0) / (size - 1)
    favourites = shares.argmax(axis=1)
    claims = np.zeros(size)
    np.maximum.at(claims, favourites, shares.max(axis=1))
    if by_target.max() >= claims.mean():
        return BackdoorHypothesis(float(by_target.max()), ONE, np.full(size, by_target.argmax(), np.int32))
    return BackdoorHypothesis(float(claims.mean()), ALL, favourites.astype(np.int32))


def _predict_changed(module: nn.Module, given: Any, images: jax.Array) -> jax.Array:
    """The classes, int32 [B, P], of the images with each of the changes [P, H, W, C]."""
    model = logits_function(module, given['model'])
    said = [model(jnp.clip(images + change[None], 0.0, 1.0)).argmax(axis=-1) for change in given['changes']]
    return jnp.stack(said, axis=1).astype(jnp.int32)
