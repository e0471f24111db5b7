"""What an experiment shows: what its models make of chosen test images, handed to report/ to be drawn."""

from pathlib import Path
from typing import Any

import jax

from aft_jax.analysis.observation import CLEAN, TRIGGERED, Observation
from aft_jax.evaluation.evaluator import Evaluator
from aft_jax.pipeline.scenario import InfectedModel, Scenario
from aft_jax.report import before_after, page, trigger_gallery
from aft_jax.results.record import first_model
from aft_jax.training.loop import Run


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
    images = {name: trigger_gallery.read(path) for name, path in drawn.items()}
    if observation is not None:
        chosen = before_after.choose(observation.labels, observation.target_map, before_after.COLUMNS)
        rows = [observation.images[kind][chosen] for kind in observation.images]
        images['_'.join(observation.images)] = trigger_gallery.mosaic(rows)
    run.writer.write_images('report', images)


def draw(
    directory: Path,
    scenario: Scenario,
    infected: InfectedModel,
    purified: dict[str, dict],
    evaluator: Evaluator,
    outcome: dict[str, Any],
    observation: Observation | None = None,
) -> None:
    """Writes the pictures and the page of an experiment; all processes take part in predictions, process 0 writes.

    Args:
        directory: Where they go; the work directory is the one above.
        scenario: What the experiment is about.
        infected: The infected model, or the benign or suspect one.
        purified: Variables by defense.
        evaluator: Of the test set.
        outcome: What results.json holds.
        observation: What `observe` returned; the page does without where there is none.
    """
    attack, dataset = infected.attack, scenario.dataset
    triggered = evaluator.triggered_test_set(attack).triggered
    target_map = attack.target_map if attack else None
    chosen = before_after.choose(dataset.test_labels, target_map, before_after.COLUMNS)
    rows = {CLEAN: dataset.test_images[chosen]}
    if triggered is not None:
        rows[TRIGGERED] = triggered[chosen]
    models_shown = {first_model(outcome): infected.variables} | purified
    said = {
        name: {kind: evaluator.predict(variables, images) for kind, images in rows.items()}
        for name, variables in models_shown.items()
    }
    if jax.process_index() != 0:
        return
    before_after.write_before_after(
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
        trigger_gallery.write_gallery(
            directory / 'triggers.png', {attack.name: (dataset.test_images[few], triggered[few])}
        )
    page.write_page(directory, outcome, observation, dataset.class_names)
