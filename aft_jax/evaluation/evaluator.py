"""The evaluator of an experiment, who alone holds the test set and the trigger."""

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
    """The test images as an attack shows them, uint8 [N, H, W, C]; None where it does not.

    Attributes:
        triggered: With the trigger.
        cross_images: In the attack's cross mode, which asks for the true label.
    """

    triggered: np.ndarray | None = None
    cross_images: np.ndarray | None = None


class Evaluator:
    """Scores a model on the test set, clean and under an attack; no defense ever holds one."""

    def __init__(self, dataset: Dataset, module: nn.Module, mesh: Mesh, batch_size: int, seed: int):
        """Prepares the evaluation of models of one architecture.

        Args:
            dataset: Data set whose test images are used.
            module: Architecture of the models.
            mesh: Devices.
            batch_size: Images in one call; rounded up to a multiple of the devices.
            seed: Seed of the experiment, for the attack's cross mode.
        """
        self.dataset = dataset
        self.predict = Predictor(module, mesh, batch_size)
        self._key = key_for(seed, 'test/cross')
        self._shown: tuple[Attack | None, AttackedTestSet] = (None, AttackedTestSet())

    def show(self, attack: Attack | None) -> AttackedTestSet:
        """Returns the test images as the attack shows them; those of the last attack are kept."""
        if attack is not self._shown[0]:
            images = self.dataset.test_images
            attacked_test_set = AttackedTestSet()
            if attack is not None:
                attacked_test_set = AttackedTestSet(
                    triggered(attack, images), cross_images(attack, images, self._key) if attack.cross_mode else None
                )
            self._shown = (attack, attacked_test_set)
        return self._shown[1]

    def __call__(self, variables: dict, attack: Attack | None) -> Scores:
        """Returns the scores, under the attack, of the model with these variables."""
        attacked_test_set = self.show(attack)
        return score(
            self.predict(variables, self.dataset.test_images),
            self.predict(variables, attacked_test_set.triggered) if attacked_test_set.triggered is not None else None,
            self.dataset.test_labels,
            attack.target_map if attack else None,
            self.dataset.num_classes,
            self.predict(variables, attacked_test_set.cross_images)
            if attacked_test_set.cross_images is not None
            else None,
        )


def test_metrics(scores: Scores) -> dict[str, float]:
    """Selects the scores that exist, under the names that metrics.jsonl has for them."""
    values = {'test_acc': scores.acc, 'test_asr': scores.asr, 'test_cross_acc': scores.cross_acc}
    return {name: value for name, value in values.items() if not math.isnan(value)}
