"""The evaluator of an experiment. It alone holds the test set and the trigger."""

import math
from typing import NamedTuple

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from aft_jax.attacks.attack import Attack, cross_images, triggered
from aft_jax.data.dataset import Dataset
from aft_jax.evaluation.scores import Scores, score
from aft_jax.randomness import key_for
from aft_jax.training.prediction import Predictor


class AttackedTestSet(NamedTuple):
    """The test images under an attack.

    Attributes:
        triggered: Test images with the trigger, uint8 [N, H, W, C]; None without an attack.
        cross: Test images in the attack's cross mode, uint8 [N, H, W, C]; None where the attack has no such mode.
    """

    triggered: np.ndarray | None = None
    cross: np.ndarray | None = None


class Evaluator:
    """Scores models on the test set, clean and under an attack. No defense ever holds an evaluator."""

    def __init__(self, dataset: Dataset, module: nn.Module, mesh: Mesh, batch_size: int, seed: int):
        """Creates an evaluator for models of one architecture.

        Args:
            dataset: Data set whose test images are used.
            module: Architecture of the models.
            mesh: Devices.
            batch_size: Images per call, rounded up to a multiple of the number of devices.
            seed: Seed of the experiment, for the attack's cross mode.
        """
        self.dataset = dataset
        self.predict = Predictor(module, mesh, batch_size)
        self._key = key_for(seed, 'test/cross')
        self._last: tuple[Attack | None, AttackedTestSet] = (None, AttackedTestSet())

    def triggered_test_set(self, attack: Attack | None) -> AttackedTestSet:
        """Applies an attack to the test images. The result for the last attack is kept for the next call."""
        last_attack, attacked = self._last
        if attack is not last_attack:
            attacked = AttackedTestSet()
            if attack is not None:
                images = self.dataset.test_images
                cross = cross_images(attack, images, self._key) if attack.cross_mode else None
                attacked = AttackedTestSet(triggered(attack, images), cross)
            self._last = (attack, attacked)
        return attacked

    def evaluate(self, variables: dict, attack: Attack | None) -> Scores:
        """Scores the model with these variables, under an attack where there is one."""
        attacked = self.triggered_test_set(attack)

        def predict(images: np.ndarray | None) -> np.ndarray | None:
            return None if images is None else self.predict(variables, images)

        return score(
            self.predict(variables, self.dataset.test_images),
            predict(attacked.triggered),
            self.dataset.test_labels,
            attack.target_map if attack else None,
            self.dataset.num_classes,
            predict(attacked.cross),
        )


def test_metrics(scores: Scores) -> dict[str, float]:
    """Selects the scores that exist, under their names in metrics.jsonl."""
    values = {'test_acc': scores.acc, 'test_asr': scores.asr, 'test_cross_acc': scores.cross_acc}
    return {name: value for name, value in values.items() if not math.isnan(value)}
