"""The report of an experiment: before_after.png, triggers.png, index.html, and the same pictures in TensorBoard."""

import jax
import numpy as np

from aft_jax.analysis.backdoor_scan import Scan
from aft_jax.analysis.observation import CLEAN, TRIGGERED, Observation
from aft_jax.attacks.attack import Attack
from aft_jax.evaluation.evaluator import Evaluator
from aft_jax.report import before_after, page, trigger_gallery
from aft_jax.report.before_after import Examples
from aft_jax.results.record import Results
from aft_jax.results.workdir import RunFiles
from aft_jax.training.stage import Run

BEFORE_AFTER, TRIGGERS = 'before_after.png', 'triggers.png'
# Images in triggers.png.
TRIGGER_IMAGES = 3


def write_report(
    files: RunFiles,
    results: Results,
    observation: Observation | None,
    *,
    evaluator: Evaluator,
    models: dict[str, dict],
    attack: Attack | None,
    scans: dict[str, Scan],
    tainted: np.ndarray,
) -> None:
    """Writes the pictures and the page. All processes take part in the predictions, and process 0 writes.

    Args:
        files: Files of the run.
        results: Results of the experiment.
        observation: Observation of the models. Without one, the page has only numbers and the examples.
        evaluator: Evaluator of the test set.
        models: Variables by model, the first model first.
        attack: Attack on the first model; None for a benign or given one.
        scans: Scans of this start, for the pictures of `found_changes.content`.
        tainted: Images that look tainted and were left out, uint8 [N, H, W, C].
    """
    examples = predict_examples(evaluator, models, attack)
    if jax.process_index() != 0:
        return
    before_after.write_before_after(files.report / BEFORE_AFTER, examples, results)
    if attack is not None and TRIGGERED in examples.images:
        clean, triggered = (examples.images[kind][:TRIGGER_IMAGES] for kind in (CLEAN, TRIGGERED))
        trigger_gallery.write_gallery(files.report / TRIGGERS, {attack.name: (clean, triggered)})
    page.write_page(files, results, observation, examples.class_names, scans, list(tainted))


def predict_examples(evaluator: Evaluator, models: dict[str, dict], attack: Attack | None) -> Examples:
    """Chooses test images, applies the trigger, and computes the prediction of each model."""
    dataset = evaluator.dataset
    target_map = attack.target_map if attack else None
    chosen = before_after.choose(dataset.test_labels, target_map, before_after.COLUMNS)
    images = {CLEAN: dataset.test_images[chosen]}
    triggered = evaluator.triggered_test_set(attack).triggered
    if triggered is not None:
        images[TRIGGERED] = triggered[chosen]
    predictions = {
        name: {kind: evaluator.predict(variables, x) for kind, x in images.items()}
        for name, variables in models.items()
    }
    return Examples(images, dataset.test_labels[chosen], target_map, dataset.class_names, predictions)


def show_in_tensorboard(run: Run, observation: Observation | None) -> None:
    """Adds the pictures of the report, and examples of each kind of image, to the run's TensorBoard files.

    Args:
        run: Run whose report is written.
        observation: Observation of the models, or None.
    """
    if jax.process_index() != 0:
        return
    paths = [RunFiles(run.workdir).report / name for name in (TRIGGERS, BEFORE_AFTER)]
    images = {path.stem: trigger_gallery.read(path) for path in paths if path.exists()}
    if observation is not None:
        chosen = before_after.choose(observation.labels, observation.target_map, before_after.COLUMNS)
        rows = [observation.images[kind][chosen] for kind in observation.images]
        images['_'.join(observation.images)] = trigger_gallery.mosaic(rows)
    run.writer.write_images('report', images)
