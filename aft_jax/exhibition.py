"""What an experiment shows: predictions on chosen test images, handed to report/ to be drawn."""

from pathlib import Path

import jax

from aft_jax.judge import Judge
from aft_jax.report import gallery, pictures
from aft_jax.victim import Infected, Victim


def draw(
    directory: Path, victim: Victim, infected: Infected, purified: dict[str, dict], judge: Judge, outcome: dict
) -> None:
    """Writes the pictures of an experiment; every process takes part in the predictions, and process 0 writes.

    Args:
        directory: Where they go.
        victim: What the experiment is about.
        infected: The infected model, or the benign one.
        purified: Variables by defense.
        judge: Of the test set.
        outcome: What results.json holds.
    """
    attack, dataset = infected.attack, victim.dataset
    exhibits = judge.show(attack)
    target_map = attack.target_map if attack else None
    chosen = pictures.choose(dataset.test_labels, target_map, pictures.COLUMNS)
    rows = {'clean': dataset.test_images[chosen]}
    if exhibits.triggered is not None:
        rows['triggered'] = exhibits.triggered[chosen]
    models_shown = {'infected' if attack else 'benign': infected.variables} | purified
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
    if attack is not None and exhibits.triggered is not None:
        chosen = pictures.choose(dataset.test_labels, target_map, 3)
        shown = {attack.name: (dataset.test_images[chosen], exhibits.triggered[chosen])}
        gallery.write_gallery(directory / 'triggers.png', shown)
