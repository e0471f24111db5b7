"""before_after.png: test images, clean and triggered, with what each model says, and the scores beside them."""

from pathlib import Path
from typing import Any

import numpy as np

from aft_jax.results.record import first_model

COLUMNS = 8
# Okabe-Ito: told apart by colour-blind readers and in grey print; words say the same.
TRUE_COLOUR, COMMANDED_COLOUR, OTHER_COLOUR = '#0072B2', '#D55E00', '#595959'


def write_before_after(
    path: Path,
    rows: dict[str, np.ndarray],
    labels: np.ndarray,
    target_map: np.ndarray | None,
    class_names: tuple[str, ...],
    said: dict[str, dict[str, np.ndarray]],
    outcome: dict[str, Any],
) -> None:
    """Draws the picture.

    Args:
        path: Of the PNG.
        rows: uint8 [k, H, W, C] by kind: 'clean', and 'triggered' where there is an attack.
        labels: int32 [k], true classes.
        target_map: int32 [K], what the trigger commands; None without an attack.
        class_names: K names.
        said: By model, the infected one first, and kind: int32 [k], the predicted classes.
        outcome: What results.json holds.
    """
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 0.8 + 1.9 * len(rows)), layout='constrained')
    grid = figure.add_gridspec(1, 2, width_ratios=[COLUMNS, 3.4])
    left, right = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    axes = left.subplots(len(rows), len(labels), squeeze=False)
    for r, (kind, images) in enumerate(rows.items()):
        for c, label in enumerate(labels):
            axis = axes[r, c]
            picture = images[c]
            axis.imshow(picture[..., 0] if picture.shape[-1] == 1 else picture, cmap='gray', vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
            if c == 0:
                axis.set_ylabel(kind, fontsize=11)
            commanded = int(target_map[label]) if target_map is not None else -1
            for line, name in enumerate(said):
                answer = int(said[name][kind][c])
                axis.text(
                    0.5,
                    -0.05 - 0.16 * line,
                    f'{name}: {class_names[answer][:14]}',
                    transform=axis.transAxes,
                    ha='center',
                    va='top',
                    fontsize=8.5,
                    color=_colour(answer, int(label), commanded),
                )
    words = 'blue: the true class'
    if 'triggered' in rows:
        words += "; orange: the attacker's class"
    left.suptitle(f'{outcome["dataset"]}, {_attack(outcome)}: what each model says ({words})', fontsize=11)
    _bars(right, outcome, with_attack='triggered' in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def choose(labels: np.ndarray, target_map: np.ndarray | None, count: int) -> np.ndarray:
    """Returns the first test image of each class in turn whose label the trigger would change, `count` at most."""
    eligible = labels != target_map[labels] if target_map is not None else np.ones(len(labels), bool)
    first = [np.flatnonzero(eligible & (labels == k))[:1] for k in np.unique(labels)]
    return np.concatenate(first)[:count]


def _bars(figure: Any, outcome: dict[str, Any], with_attack: bool) -> None:
    rows = {first_model(outcome): outcome['infected']} | outcome['purified']
    axis = figure.subplots()
    shares = [('acc', 'ACC', TRUE_COLOUR)] + ([('asr', 'ASR', COMMANDED_COLOUR)] if with_attack else [])
    height = 0.8 / len(shares)
    for i, (share, name, colour) in enumerate(shares):
        places = np.arange(len(rows)) + (i - (len(shares) - 1) / 2) * height
        values = [100 * row[share] for row in rows.values()]
        bars = axis.barh(places, values, height * 0.9, color=colour, label=name)
        axis.bar_label(bars, fmt='%.1f', padding=2, fontsize=9)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_xlim(0, 118)
    axis.set_xticks([0, 50, 100])
    axis.invert_yaxis()
    axis.spines[['top', 'right']].set_visible(False)
    axis.set_xlabel('percent of test images')
    figure.legend(loc='outside upper center', ncols=2, frameon=False)


def _colour(answer: int, label: int, commanded: int) -> str:
    if answer == label:
        return TRUE_COLOUR
    return COMMANDED_COLOUR if answer == commanded else OTHER_COLOUR


def _attack(outcome: dict[str, Any]) -> str:
    known = f'{outcome["attack"]} ({outcome["label_mode"]})'
    return {'none': 'no attack', 'unknown': 'trigger unknown'}.get(outcome['attack'], known)
