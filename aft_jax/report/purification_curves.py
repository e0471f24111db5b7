"""Figures of ACC and ASR over the epochs of purification, from the test scores in metrics.jsonl."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aft_jax.report.figure import COLOURS, FAINT, Panel, panel
from aft_jax.results.record import ModelScores, PurifiedScores, featured, percent

SCORES = {'acc': 'Clean accuracy (ACC)', 'asr': 'Attack success rate (ASR)'}
# Colour, marker and line of the featured defense, as in the other figures, and of the others. Every combination of
# colour and marker is unique.
FEATURED = (COLOURS[3], 's', '-')
OTHERS = (
    *((COLOURS[4], 'o', '--'), (COLOURS[5], '^', '-.'), (COLOURS[6], 'D', ':'), (COLOURS[1], 'v', '--')),
    *((COLOURS[2], '*', '-.'), (FAINT, 'P', ':'), (COLOURS[7], 'X', '--')),
)
# The last scores of a stage may differ from those in the table by this share: other devices round differently.
TOLERANCE = 0.005


class Curve(NamedTuple):
    """Scores by name at rising epochs of one stage of a defense. 'asr' exists with a known trigger."""

    epochs: np.ndarray
    scores: dict[str, np.ndarray]


def read(path: Path, purified: dict[str, PurifiedScores]) -> dict[str, Curve]:
    """Reads the curve of each defense that was evaluated during its training.

    A defense may train several candidates, each in its own stage, and models that are not the final one. The curve is
    that of the stage whose last scores are the scores of the purified model.

    Args:
        path: Path of metrics.jsonl.
        purified: Scores by defense.
    """
    stages = _read_stages(path)
    curves = {}
    for name, scores in purified.items():
        final = {score: value for score in SCORES if (value := scores.share(score)) is not None}
        distances = {
            stage: max(abs(entries[-1].get(f'test_{score}', np.inf) - value) for score, value in final.items())
            for stage, entries in stages.items()
            if f'{stage}/'.startswith(f'purify/{name}/')
        }
        if not distances:
            continue
        nearest = min(distances, key=lambda stage: distances[stage])
        if distances[nearest] <= TOLERANCE:
            entries = stages[nearest]
            epochs = np.array([entry['epoch'] for entry in entries])
            values = {score: np.array([entry[f'test_{score}'] for entry in entries]) for score in final}
            curves[name] = Curve(epochs, values)
    return curves


def draw(directory: Path, curves: dict[str, Curve], before: ModelScores) -> list[Panel]:
    """Draws a figure of ACC and one of ASR, with a line for each defense; none if there are no curves.

    Args:
        directory: Folder of the figures.
        curves: Curves by defense, as `read` returns them.
        before: Scores of the first model.
    """
    if not curves:
        return []
    first = featured(curves)
    others = [name for name in curves if name != first]
    styles = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)} | {first: FEATURED}
    return [
        _panel(directory, score, {name: curves[name] for name in styles}, styles, before.share(score))
        for score in SCORES
        if all(score in curve.scores for curve in curves.values())
    ]


def _read_stages(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Reads the lines of metrics.jsonl that hold test scores, by stage."""
    if not path.exists():
        return {}
    stages: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text(encoding='utf-8').splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # cut short when the process died
            continue
        if 'test_acc' in entry and 'epoch' in entry:
            stages.setdefault(entry['stage'], []).append(entry)
    return stages


def _panel(
    directory: Path,
    score: str,
    curves: dict[str, Curve],
    styles: dict[str, tuple[str, str, str]],
    level: float | None,
) -> Panel:
    def draw_lines(axes: Any) -> None:
        if level is not None:
            axes.axhline(100 * level, color=FAINT, linewidth=1, linestyle=(0, (2, 2)))
        for name, (colour, marker, line) in styles.items():
            values = 100 * curves[name].scores[score]
            axes.plot(curves[name].epochs, values, color=colour, marker=marker, linestyle=line, label=name)
        axes.set_xlabel('epochs of training images')
        axes.set_ylabel(f'{score.upper()} %')
        if score == 'asr':
            axes.set_ylim(-3, 103)
        axes.legend(frameon=False, loc='lower left', bbox_to_anchor=(0, 1), ncols=5, borderaxespad=0.2)

    lines = '. '.join(f'{name}: {_describe(curve.epochs, curve.scores[score])}' for name, curve in curves.items())
    alt = f'{score.upper()} over epochs, a line a defense. {lines}.'
    return panel(directory, f'purification_{score}', SCORES[score], alt, draw_lines)


def _describe(epochs: np.ndarray, values: np.ndarray) -> str:
    text = f'{percent(values[0])} at first, {percent(values[-1])} after {epochs[-1]:.3g} epochs'
    lowest = int(values.argmin())
    if values[lowest] < min(values[0], values[-1]):
        text += f', lowest {percent(values[lowest])} after {epochs[lowest]:.3g}'
    return text
