"""The judge of an experiment, who alone holds the test set and the trigger."""

from typing import NamedTuple

import numpy as np

from aft_jax.attacks.attack import Attack, crossed, triggered
from aft_jax.evaluation import Scores, score
from aft_jax.prediction import Predictor
from aft_jax.randomness import key_for
from aft_jax.training.loop import Run
from aft_jax.victim import Victim


class Exhibits(NamedTuple):
    """The test images as an attack shows them, uint8 [N, H, W, C]; None where it does not.

    Attributes:
        triggered: With the trigger.
        crossed: In the attack's cross mode, which asks for the true label.
    """

    triggered: np.ndarray | None = None
    crossed: np.ndarray | None = None


class Judge:
    """Scores a model on the test set, clean and under an attack; no defense ever holds one."""

    def __init__(self, victim: Victim, run: Run):
        """Judges classifiers like the victim's on its test set."""
        self.dataset = victim.dataset
        self.predict = Predictor(victim.module, run.mesh, run.options.eval_batch_size)
        self._key = key_for(run.seed, 'test/cross')
        self._shown: tuple[Attack | None, Exhibits] = (None, Exhibits())

    def show(self, attack: Attack | None) -> Exhibits:
        """Returns the test images as the attack shows them; those of the last attack are kept."""
        if attack is not self._shown[0]:
            images = self.dataset.test_images
            exhibits = Exhibits()
            if attack is not None:
                exhibits = Exhibits(
                    triggered(attack, images), crossed(attack, images, self._key) if attack.cross else None
                )
            self._shown = (attack, exhibits)
        return self._shown[1]

    def __call__(self, variables: dict, attack: Attack | None) -> Scores:
        """Returns the scores, under the attack, of the model with these variables."""
        exhibits = self.show(attack)
        return score(
            self.predict(variables, self.dataset.test_images),
            self.predict(variables, exhibits.triggered) if exhibits.triggered is not None else None,
            self.dataset.test_labels,
            attack.target_map if attack else None,
            self.dataset.num_classes,
            self.predict(variables, exhibits.crossed) if exhibits.crossed is not None else None,
        )
