"""distribution.png: the share of random triggers with more ASR left than x, a line for each defense."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aft_jax.report.figure import FAINT, Panel, panel
from aft_jax.report.purification_curves import FEATURED, OTHERS
from aft_jax.results.distribution import ALL, LEVELS, Distribution, share_above
from aft_jax.results.record import featured, percent

# The ends of the logarithmic axis. A smaller ASR than the first one is not told apart from it.
LEFT, RIGHT = 0.005, 1.0
TICKS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
UNPURIFIED_STYLE = (FAINT, '', (0, (2, 2)))
Style = tuple[str, str, Any]


def draw(directory: Path | None, distributions: Sequence[Distribution]) -> Panel | None:
    """Draws the figure. None if no model counts.

    Args:
        directory: Folder for the figure as PNG and SVG files; None if there are none.
        distributions: Distributions, as `distribution.summarise` returns them.
    """
    lines = [d for d in distributions if d.family == ALL and d.rates]
    if not lines:
        return None
    styles = _styles(lines)

    def draw_lines(axes: Any) -> None:
        for line in lines:
            places, shares = steps(line.rates)
            colour, marker, dashes = styles[line.name]
            marked = [int(np.searchsorted(places, level)) for level in LEVELS]
            axes.plot(
                100 * places,
                100 * shares,
                drawstyle='steps-post',
                color=colour,
                linestyle=dashes,
                marker=marker,
                markevery=marked,
                markersize=5,
                label='infected' + line.name.removeprefix(line.case['defense']) if line.unpurified else line.name,
                zorder=1 if line.unpurified else 2,
            )
        axes.set_xscale('log')
        axes.set_xlim(100 * LEFT, 100 * RIGHT)
        axes.set_xticks([100 * tick for tick in TICKS], [f'{100 * tick:g}' for tick in TICKS])
        axes.minorticks_off()
        axes.set_ylim(-2, 103)
        axes.set_xlabel('ASR % (logarithmic)')
        axes.set_ylabel('triggers with more ASR left, %')
        axes.legend(frameon=False, loc='lower left', bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2)

    texts = [f'{line.name}: {_describe(line)}' for line in lines]
    alt = f'Share of triggers with more ASR left than x, a line a defense. {". ".join(texts)}.'
    title = 'Share of random triggers with more ASR left than x'
    return panel(directory, 'distribution', title, alt, draw_lines, width=6.0, height=3.9)


def steps(rates: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Computes the line of a defense: rising places from `LEFT` to `RIGHT`, and the share of rates above each.

    Args:
        rates: Attack success rates in 0..1.
    """
    values = np.asarray(rates)
    places = np.unique(np.concatenate([[LEFT, RIGHT], LEVELS, values[(values > LEFT) & (values < RIGHT)]]))
    return places, np.array([share_above(rates, place) for place in places])


def _styles(lines: Sequence[Distribution]) -> dict[str, Style]:
    """Chooses colour, marker and line by name. The markers stand at `LEVELS`."""
    purified = [line for line in lines if not line.unpurified]
    styles: dict[str, Style] = {line.name: UNPURIFIED_STYLE for line in lines if line.unpurified}
    if not purified:
        return styles
    first = featured(line.case['defense'] for line in purified)
    name = next(line.name for line in purified if line.case['defense'] == first)
    others = [line.name for line in purified if line.name != name]
    return styles | {other: OTHERS[i % len(OTHERS)] for i, other in enumerate(others)} | {name: FEATURED}


def _describe(line: Distribution) -> str:
    return ', '.join(f'{percent(share_above(line.rates, level))} above {100 * level:g} %' for level in LEVELS)
