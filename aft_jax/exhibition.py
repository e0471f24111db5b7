"""What an experiment shows: what its models make of chosen test images, handed to report/ to be drawn."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aft_jax.analysis.connection import Shown, connection
from aft_jax.analysis.measures import target_share
from aft_jax.analysis.probe import Probe
from aft_jax.judge import Judge
from aft_jax.models.factory import shows_features
from aft_jax.report import gallery, page, pictures
from aft_jax.report.observation import ADVERSARIAL, CLEAN, TRIGGERED, Observation, Seen
from aft_jax.report.verdict import featured, first_model
from aft_jax.training.loop import Run
from aft_jax.victim import Infected, Victim

# A sample is enough for what the page shows, and the adversarial examples of it are made in seconds.
IMAGES = 300
# Batches of a multiple of this, so that runs of about as many images share their compiled functions.
BATCH = 16
EPS = 8 / 255
SWEPT_EPS = tuple(n / 255 for n in (2, 4, 8, 16, 32))


def observe(
    run: Run, victim: Victim, infected: Infected, purified: dict[str, dict], judge: Judge, outcome: dict[str, Any]
) -> Observation | None:
    """Returns what the models make of clean, triggered and adversarial test images; every process takes part.

    Images whose true label is the commanded one are left out. The target share over eps is measured for two models,
    the infected one and the one that the verdict is about.

    Args:
        run: The experiment's run.
        victim: What the experiment is about.
        infected: The infected model, or the benign or suspect one.
        purified: Variables by defense.
        judge: Of the test set.
        outcome: What results.json holds so far; the connection of purified models that are not at hand is kept.

    Returns:
        None where no test image is left.
    """
    attack, dataset = infected.attack, victim.dataset
    chosen = np.linspace(0, len(dataset.test_labels) - 1, min(len(dataset.test_labels), IMAGES)).round().astype(int)
    if attack is not None:
        labels = dataset.test_labels[chosen]
        chosen = chosen[attack.target_map[labels] != labels]
    if not len(chosen):
        return None
    labels = dataset.test_labels[chosen]
    stored = {CLEAN: dataset.test_images[chosen]}
    triggered = judge.show(attack).triggered
    if triggered is not None:
        stored[TRIGGERED] = triggered[chosen]
    # As floats, like the adversarial examples, so that each of the probe's functions is compiled once.
    images = {kind: x.astype(np.float32) / np.float32(255) for kind, x in stored.items()}
    probe = Probe(victim.module, run.mesh, min(run.options.eval_batch_size, BATCH * math.ceil(len(chosen) / BATCH)))
    models = {first_model(outcome): infected.variables} | purified

    def attacked(variables: dict, eps: float) -> np.ndarray:
        return probe.adversarial(variables, images[CLEAN], labels, 'linf', eps)

    examples = {name: attacked(variables, EPS) for name, variables in models.items()}
    features = shows_features(victim.module)
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


def show_in_tensorboard(run: Run, directory: Path, observation: Observation | None) -> None:
    """Shows the pictures of the report among the metrics: those that were drawn, and examples of each kind of image.

    Args:
        run: The experiment's run.
        directory: Where `draw` has written.
        observation: What `observe` returned.
    """
    if jax.process_index() != 0:
        return
    drawn = {path.stem: path for path in (directory / 'triggers.png', directory / 'before_after.png') if path.exists()}
    images = {name: gallery.read(path) for name, path in drawn.items()}
    if observation is not None:
        chosen = pictures.choose(observation.labels, observation.target_map, pictures.COLUMNS)
        rows = [observation.images[kind][chosen] for kind in observation.images]
        images['_'.join(observation.images)] = gallery.mosaic(rows)
    run.writer.write_images('report', images)


def draw(
    directory: Path,
    victim: Victim,
    infected: Infected,
    purified: dict[str, dict],
    judge: Judge,
    outcome: dict[str, Any],
    observation: Observation | None = None,
) -> None:
    """Writes the pictures and the page of an experiment; all processes take part in predictions, process 0 writes.

    Args:
        directory: Where they go; the work directory is the one above.
        victim: What the experiment is about.
        infected: The infected model, or the benign or suspect one.
        purified: Variables by defense.
        judge: Of the test set.
        outcome: What results.json holds.
        observation: What `observe` returned; the page does without where there is none.
    """
    attack, dataset = infected.attack, victim.dataset
    triggered = judge.show(attack).triggered
    target_map = attack.target_map if attack else None
    chosen = pictures.choose(dataset.test_labels, target_map, pictures.COLUMNS)
    rows = {CLEAN: dataset.test_images[chosen]}
    if triggered is not None:
        rows[TRIGGERED] = triggered[chosen]
    models_shown = {first_model(outcome): infected.variables} | purified
    said = {
        name: {kind: judge.predict(variables, images) for kind, images in rows.items()}
        for name, variables in models_shown.items()
    }
    if jax.process_index() != 0:
        return
    pictures.write_before_after(
        directory / 'before_after.png',
        rows,
        dataset.test_labels[chosen],
        target_map,
        dataset.class_names,
        said,
        outcome,
    )
    if attack is not None and triggered is not None:
        few = chosen[:3]
        gallery.write_gallery(directory / 'triggers.png', {attack.name: (dataset.test_images[few], triggered[few])})
    page.write_page(directory, outcome, observation, dataset.class_names)
