"""The stage 'tainted' of a given model: images that look tainted are left out of the clean ones."""

import dataclasses
from typing import NamedTuple

import ml_collections
import numpy as np

from aft_jax.defenses.defender import DefenderData
from aft_jax.defenses.tainted_images import find_tainted
from aft_jax.models.custom import shows_features
from aft_jax.pipeline.scenario import Scenario
from aft_jax.pipeline.stages import defense_settings
from aft_jax.training.stage import Run


class Tainted(NamedTuple):
    """Images that look tainted.

    Attributes:
        indices: Their indices by part, 'training' and 'evaluation'.
        images: uint8 [N, H, W, C].
    """

    indices: dict[str, list[int]]
    images: np.ndarray


NO_TAINTED = Tainted({}, np.zeros((0, 0, 0, 0), np.uint8))


def leave_out_tainted(
    run: Run, scenario: Scenario, variables: dict, config: ml_collections.ConfigDict
) -> tuple[Scenario, Tainted]:
    """Finds the tainted images, for the training and for the evaluation, and leaves them out.

    Args:
        run: Experiment.
        scenario: Data and module.
        variables: Variables of the given model.
        config: Resolved config.

    Returns:
        The scenario without these images, and the images; none if the module shows no feature maps.
    """
    dataset, clean = scenario.dataset, scenario.clean
    if not config.safety.find_tainted or not shows_features(scenario.module):
        return scenario, NO_TAINTED
    images = np.concatenate([dataset.train_images[clean], dataset.test_images])
    labels = np.concatenate([dataset.train_labels[clean], dataset.test_labels])
    data = DefenderData(scenario.module, variables, images, labels)
    found = find_tainted(run, 'tainted', data, defense_settings('aft', config))
    training, evaluation = found[found < len(clean)], found[found >= len(clean)] - len(clean)
    kept = np.setdiff1d(np.arange(len(dataset.test_labels)), evaluation)
    filtered = dataclasses.replace(
        dataset, test_images=dataset.test_images[kept], test_labels=dataset.test_labels[kept]
    )
    indices = {'training': clean[training].tolist(), 'evaluation': evaluation.tolist()}
    return scenario._replace(dataset=filtered, clean=np.delete(clean, training)), Tainted(indices, images[found])
