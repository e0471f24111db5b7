"""ACC and ASR over the epochs of purification, from what the evaluator wrote into metrics.jsonl while looking on."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aft_jax.report.figure import COLOURS, FAINT, Panel, panel
from aft_jax.results.record import featured, percent

SCORES = {'acc': 'Clean accuracy (ACC)', 'asr': 'Attack success rate (ASR)'}
# The defense of the verdict as in the other figures, and the rest; no two have colour and marker in common.
FEATURED = (COLOURS[3], 's', '-')
OTHERS = (
    *((COLOURS[4], 'o', '--'), (COLOURS[5], '^', '-.'), (COLOURS[6], 'D', ':'), (COLOURS[1], 'v', '--')),
    *((COLOURS[2], '*', '-.'), (FAINT, 'P', ':'), (COLOURS[7], 'X', '--')),
)
# How far, as a share, the end of a stage may lie from a score in the table: rounding on other devices.
SAME = 0.005


class Curve(NamedTuple):
    """A stage of a defense: epochs, rising, and the scores by name at each; 'asr' where the trigger is known."""

    epochs: np.ndarray
    scores: dict[str, np.ndarray]


def read(path: Path, purified: dict[str, dict[str, Any]]) -> dict[str, Curve]:
    """Returns the curve of each defense that was watched.

    A defense may train several candidates, each in a stage of its own, and other things that are not the model of the
    table. Shown is the stage whose end has that model's scores.

    Args:
        path: Of metrics.jsonl.
        purified: Of results.json.
    """
    if not path.exists():
        return {}
    stages: dict[str, list[dict[str, float]]] = {}
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # cut short when the process died
            continue
        if 'test_acc' in entry and 'epoch' in entry:
            stages.setdefault(entry['stage'], []).append(entry)
    curves = {}
    for name, scores in purified.items():
        wanted = {score: scores[score] for score in SCORES if scores.get(score) is not None}
        ended = {
            stage: max(abs(entries[-1].get(f'test_{score}', np.inf) - value) for score, value in wanted.items())
            for stage, entries in stages.items()
            if f'{stage}/'.startswith(f'purify/{name}/')
        }
        if ended and ended[nearest := min(ended, key=lambda stage: ended[stage])] <= SAME:
            entries = stages[nearest]
            found = {score: np.array([entry[f'test_{score}'] for entry in entries]) for score in wanted}
            curves[name] = Curve(np.array([entry['epoch'] for entry in entries]), found)
    return curves


def draw(directory: Path, curves: dict[str, Curve], before: dict[str, Any]) -> list[Panel]:
    """Draws ACC and ASR, a figure each and in it a line a defense; none where nothing was watched.

    Args:
        directory: Of the files.
        curves: As `read` returns them.
        before: The scores of the model that all starts from.
    """
    if not curves:
        return []
    first = featured(curves)
    others = [name for name in curves if name != first]
    looks = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)} | {first: FEATURED}
    return [
        _panel(directory, score, title, {name: curves[name] for name in looks}, looks, before.get(score))
        for score, title in SCORES.items()
        if all(score in curve.scores for curve in curves.values())
    ]


def _panel(
    directory: Path,
    score: str,
    title: str,
    curves: dict[str, Curve],
    looks: dict[str, tuple[str, str, str]],
    level: float | None,
) -> Panel:
    def lines(axes: Any) -> None:
        if level is not None:
            axes.axhline(100 * level, color=FAINT, linewidth=1, linestyle=(0, (2, 2)))
        for name, (colour, marker, line) in looks.items():
            values = 100 * curves[name].scores[score]
            axes.plot(curves[name].epochs, values, color=colour, marker=marker, linestyle=line, label=name)
        axes.set_xlabel('epochs of the images that it trains on')
        axes.set_ylabel(f'{score.upper()} %')
        if score == 'asr':
            axes.set_ylim(-3, 103)
        axes.legend(frameon=False, loc='lower left', bbox_to_anchor=(0, 1), ncols=5, borderaxespad=0.2)

    told = '. '.join(f'{name}: {_told(curve.epochs, curve.scores[score])}' for name, curve in curves.items())
    alt = f'{score.upper()} over epochs, a line a defense. {told}.'
    return panel(directory, f'purification_{score}', title, alt, lines)


def _told(epochs: np.ndarray, values: np.ndarray) -> str:
    text = f'{percent(values[0])} at first, {percent(values[-1])} after {epochs[-1]:.3g} epochs'
    lowest = int(values.argmin())
    if values[lowest] < min(values[0], values[-1]):
        text += f', lowest {percent(values[lowest])} after {epochs[lowest]:.3g}'
    return text
