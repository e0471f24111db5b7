"""Measures what an experiment's models predict for chosen clean, triggered and adversarial test images."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from aft_jax.analysis.connection import Shown, connection
from aft_jax.analysis.measures import target_share
from aft_jax.analysis.observation import ADVERSARIAL, CLEAN, TRIGGERED, Observation, Seen
from aft_jax.analysis.probe import Probe
from aft_jax.evaluation.evaluator import Evaluator
from aft_jax.models.custom import shows_features
from aft_jax.pipeline.scenario import InfectedModel, Scenario
from aft_jax.results.record import featured, first_model
from aft_jax.training.loop import Run

# A sample is enough for what the page shows, and the adversarial examples of it are made in seconds.
IMAGES = 300
# Batches of a multiple of this, so that runs of about as many images share their compiled functions.
BATCH = 16
EPS = 8 / 255
SWEPT_EPS = tuple(n / 255 for n in (2, 4, 8, 16, 32))


def observe(
    run: Run,
    scenario: Scenario,
    infected: InfectedModel,
    purified: dict[str, dict],
    evaluator: Evaluator,
    outcome: dict[str, Any],
) -> Observation | None:
    """Returns what the models make of clean, triggered and adversarial test images; every process takes part.

    Images whose true label is the commanded one are left out. The target share over eps is measured for two models,
    the infected one and the one that the verdict is about.

    Args:
        run: The experiment's run.
        scenario: What the experiment is about.
        infected: The infected model, or the benign or suspect one.
        purified: Variables by defense.
        evaluator: Of the test set.
        outcome: What results.json holds so far; the connection of purified models that are not at hand is kept.

    Returns:
        None where no test image is left.
    """
    attack, dataset = infected.attack, scenario.dataset
    chosen = np.linspace(0, len(dataset.test_labels) - 1, min(len(dataset.test_labels), IMAGES)).round().astype(int)
    if attack is not None:
        labels = dataset.test_labels[chosen]
        chosen = chosen[attack.target_map[labels] != labels]
    if not len(chosen):
        return None
    labels = dataset.test_labels[chosen]
    stored = {CLEAN: dataset.test_images[chosen]}
    triggered = evaluator.show(attack).triggered
    if triggered is not None:
        stored[TRIGGERED] = triggered[chosen]
    # As floats, like the adversarial examples, so that each of the probe's functions is compiled once.
    images = {kind: x.astype(np.float32) / np.float32(255) for kind, x in stored.items()}
    probe = Probe(scenario.module, run.mesh, min(run.options.eval_batch_size, BATCH * math.ceil(len(chosen) / BATCH)))
    models = {first_model(outcome): infected.variables} | purified

    def attacked(variables: dict, eps: float) -> np.ndarray:
        return probe.adversarial(variables, images[CLEAN], labels, 'linf', eps)

    examples = {name: attacked(variables, EPS) for name, variables in models.items()}
    features = shows_features(scenario.module)
    seen = {
        name: _look(probe, variables, images | {ADVERSARIAL: examples[name]}, features)
        for name, variables in models.items()
    }
    swept, connected = {}, None
    if attack is not None and triggered is not None:
        shown = Shown(images[CLEAN], images[TRIGGERED], labels, attack.target_map)
        if features:
            measured = {
                name: connection(probe, variables, None, shown, 'linf', EPS, examples[name])
                for name, variables in models.items()
            }
            connected = _kept_together(outcome, measured)
        for name in _compared(models):
            said = [
                seen[name].said[ADVERSARIAL] if eps == EPS else probe.predict(models[name], attacked(models[name], eps))
                for eps in SWEPT_EPS
            ]
            swept[name] = [target_share(answers, labels, attack.target_map) for answers in said]
    first = examples[first_model(outcome)]
    return Observation(
        labels=labels,
        target_map=attack.target_map if attack else None,
        eps=EPS,
        images=stored | {ADVERSARIAL: np.round(first * 255).astype(np.uint8)},
        seen=seen,
        transferred={name: probe.predict(variables, first) for name, variables in models.items()},
        swept_eps=SWEPT_EPS,
        swept=swept,
        connection=connected,
    )


def _look(probe: Probe, variables: dict, images: dict[str, np.ndarray], features: bool) -> Seen:
    return Seen(
        {kind: probe.predict(variables, x) for kind, x in images.items()},
        {kind: probe.channels(variables, x) for kind, x in images.items()} if features else {},
    )


def _compared(models: Iterable[str]) -> list[str]:
    first, *defenses = models
    return [first] + ([featured(defenses)] if defenses else [])


def _kept_together(outcome: dict[str, Any], measured: dict[str, dict]) -> dict[str, Any]:
    """The first model's measurements, and below 'purified' those of each defense, old ones beside new ones."""
    first, *defenses = measured
    earlier = (outcome.get('connection') or {}).get('purified', {})
    return measured[first] | {'purified': earlier | {name: measured[name] for name in defenses}}
