"""Bars of ACC and ASR with their standard deviation over seeds: table.png of all cases, and a figure of one case."""

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aft_jax.config import BENIGN
from aft_jax.report.figure import BLUE, COLOURS, FAINT, INK, Panel, panel
from aft_jax.results.aggregate import Group, Spread
from aft_jax.results.record import percent

HATCHES = ('', '//', '..', 'xx', '\\\\', '--', '++', 'oo')
PANELS = {'acc': 'ACC %', 'asr': 'ASR %'}
SCORE_COLOURS = {'acc': BLUE, 'asr': COLOURS[2]}


def write_bars(path: Path, groups: Sequence[Group]) -> None:
    """Writes the figure of all cases as PNG, and as SVG beside it.

    Args:
        path: Path of the PNG.
        groups: Groups of runs, as `aggregate.summarise` returns them.
    """
    figure = draw_bars(groups)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    figure.savefig(path.with_suffix('.svg'))


def draw_bars(groups: Sequence[Group]) -> Any:
    """Draws a Matplotlib figure with ACC and ASR: a group of bars for each case, a bar for each defense."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(_case(group) for group in groups))
    defenses = list(dict.fromkeys(group.case['defense'] for group in groups))
    width = 0.8 / len(defenses)
    figure = Figure(figsize=(max(5.0, 1.1 * len(cases) + 1), 5.5), layout='constrained')
    axes = figure.subplots(len(PANELS), 1, sharex=True)
    for axis, (score, title) in zip(axes, PANELS.items(), strict=True):
        for group in groups:
            if score not in group.scores:
                continue
            which = defenses.index(group.case['defense'])
            mean, deviation = group.scores[score]
            axis.bar(
                cases.index(_case(group)) + (which - (len(defenses) - 1) / 2) * width,
                100 * mean,
                width,
                yerr=None if deviation is None else 100 * deviation,
                color=COLOURS[which % len(COLOURS)],
                hatch=HATCHES[which % len(HATCHES)],
                edgecolor='white',
                capsize=2,
                label=group.case['defense'],
            )
        axis.set_ylabel(title)
        axis.set_ylim(0, 105)
        axis.spines[['top', 'right']].set_visible(False)
    axes[-1].set_xticks(np.arange(len(cases)), ['\n'.join(case) for case in cases])
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc='outside upper center', ncols=len(defenses), frameon=False)
    return figure


def _case(group: Group) -> tuple[str, str]:
    attack = group.case['attack']
    return (attack, group.case['label_mode']) if attack != BENIGN else ('benign', '')


def case(name: str, rows: dict[str, dict[str, Spread]], first: Container[str]) -> Panel:
    """Draws the bars of one case, a row for each defense.

    Args:
        name: Name of the figure, unique in the page.
        rows: Scores by defense, in the order of the rows.
        first: Rows of models that were not purified; they are grey.
    """
    shown = [score for score in PANELS if any(score in scores for scores in rows.values())]

    def draw(axes: Any) -> None:
        for axis, score in zip(np.ravel(axes), shown, strict=True):
            for place, (defense, scores) in enumerate(rows.items()):
                if score not in scores:
                    continue
                mean, deviation = scores[score]
                wide = None if deviation is None else 100 * deviation
                colour = FAINT if defense in first else SCORE_COLOURS[score]
                axis.barh(place, 100 * mean, 0.72, color=colour, xerr=wide, ecolor=INK, capsize=2.5)
                axis.text(100 * mean + (wide or 0) + 2.5, place, f'{100 * mean:.1f}', va='center')
            axis.set_xlim(0, 138)
            axis.set_xticks([0, 50, 100])
            axis.tick_params(axis='y', length=0)
            axis.set_xlabel(PANELS[score])
        np.ravel(axes)[0].set_yticks(range(len(rows)), list(rows))
        np.ravel(axes)[0].invert_yaxis()

    lines = [f'{PANELS[score].removesuffix(" %")}: {", ".join(_describe(rows, score))}' for score in shown]
    alt = f'Bars, a row a defense. {". ".join(lines)}.'
    return panel(None, name, '', alt, draw, height=0.75 + 0.27 * max(len(rows), 3), columns=len(shown), width=4.4)


def _describe(rows: dict[str, dict[str, Spread]], score: str) -> list[str]:
    texts = []
    for name, scores in rows.items():
        if score in scores:
            mean, deviation = scores[score]
            texts.append(f'{name} {percent(mean)}' + ('' if deviation is None else f' ± {100 * deviation:.1f}'))
    return texts
