"""relapse.png: the attack success rate while models are trained on a few triggered images again."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from aft_jax.report.figure import COLOURS

MARKERS = 'osD^v*XP'


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Draws the figure and writes it as PNG.

    Args:
        path: Path of the PNG.
        rows: Rows of relapse.csv.
    """
    figure = draw(list(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw(rows: list[dict[str, Any]]) -> Any:
    """Draws a Matplotlib figure with axes for each number of triggered images, and a line for each model.

    A line is the mean over runs, and the area around it is their range.
    """
    from matplotlib.figure import Figure

    numbers = sorted({row['per_class'] for row in rows})
    models = list(dict.fromkeys(row['model'] for row in rows))
    figure = Figure(figsize=(3.2 * len(numbers) + 0.8, 3.4), layout='constrained')
    axes = figure.subplots(1, len(numbers), sharey=True, squeeze=False)
    for axis, number in zip(axes[0], numbers, strict=True):
        for i, model in enumerate(models):
            chosen = [row for row in rows if (row['per_class'], row['model']) == (number, model)]
            steps = sorted({row['step'] for row in chosen})
            rates = [[100 * row['asr'] for row in chosen if row['step'] == step] for step in steps]
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            label = model if axis is axes[0, 0] else None
            axis.plot(steps, [np.mean(r) for r in rates], color=colour, marker=marker, markersize=3, label=label)
            axis.fill_between(steps, [min(r) for r in rates], [max(r) for r in rates], color=colour, alpha=0.15, lw=0)
        axis.set_title(f'{number} a class', fontsize=10)
        axis.set_xlabel('steps')
        axis.set_ylim(-2, 102)
        axis.spines[['top', 'right']].set_visible(False)
    axes[0, 0].set_ylabel('ASR %')
    figure.legend(loc='outside upper center', ncols=len(models), frameon=False)
    return figure
