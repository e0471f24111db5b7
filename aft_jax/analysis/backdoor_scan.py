"""Looking for a backdoor with nothing but clean images: the infection score, and where adversarial examples lead."""

from typing import Any

import numpy as np

from aft_jax.analysis.infection_score import Scorer
from aft_jax.analysis.probe import Probe
from aft_jax.pipeline.scenario import Scenario
from aft_jax.randomness import generator_for
from aft_jax.training.loop import Run

# A class, for a score that means something.
IMAGES_OF_A_CLASS = 20
# More of a class add to the time alone.
LARGEST_OF_A_CLASS = 50


class Scanner:
    """Scans models of one architecture on the same images.

    These are the images held out, which no defense trains on, where they are enough, and all clean images otherwise.
    """

    def __init__(self, scenario: Scenario, run: Run):
        """Scans classifiers like the scenario's."""
        dataset = scenario.dataset
        self._num_classes = dataset.num_classes
        self.held_out = len(dataset.test_labels) >= IMAGES_OF_A_CLASS * dataset.num_classes
        images, labels = dataset.test_images, dataset.test_labels
        if not self.held_out:
            images = np.concatenate([images, dataset.train_images[scenario.clean]])
            labels = np.concatenate([labels, dataset.train_labels[scenario.clean]])
        # The score halves the images, which may be in the order of their classes.
        order = generator_for(run.seed, 'scan').permutation(len(labels))
        chosen = order[: LARGEST_OF_A_CLASS * dataset.num_classes]
        self._images, self._labels = images[chosen], labels[chosen]
        batch_size = min(run.options.eval_batch_size, len(chosen))
        probe = Probe(scenario.module, run.mesh, batch_size)
        self._score = Scorer(probe, scenario.module, run.mesh, batch_size)

    def __call__(self, variables: dict) -> dict[str, Any]:
        """Returns what a scan finds, as plain values for results.json.

        Beside what `InfectionScore.as_dict` tells: 'images', how many were used; 'held_out', whether no defense trains
        on them; 'suspected_label', the one label of a backdoor all2one, or None; 'fooled', the share of the images
        that an adversarial example takes away from their class, by landing_eps; 'largest_landing', the share of those
        that land in the class where most of them do.
        """
        found = self._score(variables, self._images, self._labels, self._num_classes)
        fooled = found.landing.sum(axis=(1, 2))
        largest = found.landing.sum(axis=1).max(axis=1)
        suspected = found.hypothesis.target_map
        return {
            'images': len(self._labels),
            'held_out': self.held_out,
            **found.as_dict(),
            'suspected_label': int(suspected[0]) if found.hypothesis.kind == 'all2one' else None,
            'fooled': [round(float(n) / len(self._labels), 6) for n in fooled],
            'largest_landing': [round(float(a / b), 6) if b else None for a, b in zip(largest, fooled, strict=True)],
        }
