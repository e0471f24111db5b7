"""Observes the models of an experiment: their outputs for clean, triggered and adversarial test images."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from aft_jax.analysis.connection import MeasuredImages, connection, evenly
from aft_jax.analysis.measures import target_share
from aft_jax.analysis.observation import ADVERSARIAL, CLEAN, TRIGGERED, ModelOutputs, Observation
from aft_jax.analysis.probe import ModelProbe
from aft_jax.attacks.attack import Attack
from aft_jax.evaluation.bootstrap import Estimate
from aft_jax.evaluation.evaluator import Evaluator
from aft_jax.models.custom import shows_features
from aft_jax.pipeline.scenario import InfectedModel, Scenario
from aft_jax.results.record import featured
from aft_jax.training.prediction import float_images
from aft_jax.training.stage import Run

# A sample is enough for the page, and its adversarial examples take only seconds.
IMAGES = 300
# The batch size is a multiple of this, so that runs with similar numbers of images share their compiled functions.
BATCH = 16
EPS = 8 / 255
SWEPT_EPS = tuple(n / 255 for n in (2, 4, 8, 16, 32))


def observe(
    run: Run,
    scenario: Scenario,
    infected: InfectedModel,
    purified: dict[str, dict],
    evaluator: Evaluator,
    first: str,
) -> Observation | None:
    """Observes the first model and the purified ones on a sample of the test images. Every process takes part.

    The target share is swept over eps for two models: the first one, and the one that the verdict is about.

    Args:
        run: Run of the experiment.
        scenario: Scenario of the experiment.
        infected: Infected model, or the benign or given one.
        purified: Variables by defense.
        evaluator: Evaluator of the test set.
        first: Name of the first model.

    Returns:
        The observation; None if no test image is left.
    """
    attack, dataset = infected.attack, scenario.dataset
    chosen = choose_images(dataset.test_labels, attack)
    if not len(chosen):
        return None
    labels = dataset.test_labels[chosen]
    stored = {CLEAN: dataset.test_images[chosen]}
    triggered = evaluator.triggered_test_set(attack).triggered
    if triggered is not None:
        stored[TRIGGERED] = triggered[chosen]
    # Floats, as the adversarial examples are, so that each function of the probe is compiled once.
    images = {kind: float_images(x) for kind, x in stored.items()}
    batch_size = min(run.options.eval_batch_size, BATCH * math.ceil(len(chosen) / BATCH))
    probe = ModelProbe(scenario.module, run.mesh, batch_size)
    models = {first: infected.variables} | purified

    examples = adversarial_examples(probe, models, images[CLEAN], labels, EPS)
    has_features = shows_features(scenario.module)
    outputs = {
        name: model_outputs(probe, variables, images | {ADVERSARIAL: examples[name]}, has_features)
        for name, variables in models.items()
    }
    swept, connected = {}, None
    if attack is not None and triggered is not None:
        measured = MeasuredImages(images[CLEAN], images[TRIGGERED], labels, attack.target_map)
        if has_features:
            connected = measure_connection(probe, models, measured, examples)
        swept = {
            name: sweep_eps(probe, models[name], measured, outputs[name].predictions[ADVERSARIAL])
            for name in _swept_models(models)
        }
    return Observation(
        labels=labels,
        target_map=attack.target_map if attack else None,
        eps=EPS,
        images=stored | {ADVERSARIAL: np.round(examples[first] * 255).astype(np.uint8)},
        outputs=outputs,
        transferred={name: probe.predict(variables, examples[first]) for name, variables in models.items()},
        swept_eps=SWEPT_EPS,
        swept=swept,
        connection=connected,
    )


def choose_images(labels: np.ndarray, attack: Attack | None) -> np.ndarray:
    """Chooses a sample of images, without those whose true label is the target label.

    Args:
        labels: True labels of the test images, int32 [N].
        attack: Attack, or None.

    Returns:
        Indices of at most `IMAGES` images, int64.
    """
    chosen = evenly(len(labels), IMAGES)
    if attack is None:
        return chosen
    return chosen[attack.target_map[labels[chosen]] != labels[chosen]]


def adversarial_examples(
    probe: ModelProbe, models: dict[str, dict], images: np.ndarray, labels: np.ndarray, eps: float
) -> dict[str, np.ndarray]:
    """Computes untargeted adversarial examples (Linf) of the images for each model, float32 [N, H, W, C]."""
    return {name: probe.adversarial(variables, images, labels, 'linf', eps) for name, variables in models.items()}


def model_outputs(
    probe: ModelProbe, variables: dict, images: dict[str, np.ndarray], has_features: bool
) -> ModelOutputs:
    """Computes the outputs of one model for each kind of image."""
    return ModelOutputs(
        {kind: probe.predict(variables, x) for kind, x in images.items()},
        {kind: probe.channels(variables, x) for kind, x in images.items()} if has_features else {},
    )


def measure_connection(
    probe: ModelProbe, models: dict[str, dict], images: MeasuredImages, examples: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Measures the connection of each model for results.json.

    Args:
        probe: Compiled functions for the architecture.
        models: Variables by model, the first model first.
        images: Images to measure on.
        examples: Adversarial examples by model, of size `EPS`.

    Returns:
        The measurements of the first model, as `connection` returns them. Those of the other models are in 'purified'.
    """
    measured = {
        name: connection(probe, variables, None, images, norm='linf', eps=EPS, examples=examples[name])
        for name, variables in models.items()
    }
    first, *defenses = measured
    return measured[first] | {'purified': {name: measured[name] for name in defenses}}


def sweep_eps(probe: ModelProbe, variables: dict, images: MeasuredImages, predictions: np.ndarray) -> list[Estimate]:
    """Measures the target share of one model at each of `SWEPT_EPS`.

    Args:
        probe: Compiled functions for the architecture.
        variables: Variables of the model.
        images: Images to measure on.
        predictions: Predictions for the adversarial examples of size `EPS`, int32 [N].
    """
    shares = []
    for eps in SWEPT_EPS:
        if eps != EPS:
            examples = probe.adversarial(variables, images.clean, images.labels, 'linf', eps)
            shares.append(target_share(probe.predict(variables, examples), images.labels, images.target_map))
        else:
            shares.append(target_share(predictions, images.labels, images.target_map))
    return shares


def _swept_models(models: Iterable[str]) -> list[str]:
    first, *defenses = models
    return [first] + ([featured(defenses)] if defenses else [])
