"""scans.png: ROC curves of the search for triggers, before and after purification."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aft_jax.analysis.scan_table import ScannedModel
from aft_jax.evaluation.roc import auc
from aft_jax.report.figure import COLOURS, FAINT


def write(path: Path, models: Sequence[ScannedModel]) -> None:
    """Draws the figure and writes it as PNG."""
    draw(models).savefig(path, dpi=110)


def draw(models: Sequence[ScannedModel]) -> Any:
    """Draws a Matplotlib figure: models with a backdoor against benign ones, by how far a change is above its limit.

    A circle shows the verdict, which is that of a margin above 0.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout='constrained')
    for axis, purified in zip(figure.subplots(1, 2), (False, True), strict=True):
        chosen = [model for model in models if model.purified == purified]
        positives = np.array([model.furthest[0] for model in chosen if model.counts_as])
        negatives = np.array([model.furthest[0] for model in chosen if model.asr is None])
        title = 'purified' if purified else 'before purification'
        axis.set_title(f'{title}: {len(positives)} with a backdoor, {len(negatives)} benign', fontsize=9)
        if len(positives) and len(negatives):
            limits = np.concatenate([[np.inf], np.unique(np.concatenate([positives, negatives]))[::-1], [-np.inf]])
            rates = [[100 * np.mean(group >= limit) for limit in limits] for group in (negatives, positives)]
            label = f'AUC {auc(positives, negatives):.3f}'
            axis.plot(*rates, drawstyle='steps-post', color=COLOURS[0], label=label)
            verdict = [100 * np.mean(group > 0) for group in (negatives, positives)]
            axis.plot(*verdict, 'o', color=COLOURS[0], fillstyle='none', clip_on=False, label='verdict')
            axis.legend(loc='lower right', frameon=False)
        axis.plot([0, 100], [0, 100], color=FAINT, lw=0.8)
        axis.set_xlabel('benign models above the limit %')
        axis.spines[['top', 'right']].set_visible(False)
    figure.axes[0].set_ylabel('models with a backdoor above the limit %')
    return figure
