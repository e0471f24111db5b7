"""Figures of a page: SVG by Matplotlib, with an alternative text that describes them.

`vector` replaces the colours of ink and paper by those of the page, for light and dark mode.
"""

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Okabe-Ito colours: colour-blind readers can tell them apart. Markers, lines or hatches do the same in grey print.
COLOURS = ('#595959', '#56B4E9', '#D55E00', '#009E73', '#E69F00', '#0072B2', '#CC79A7', '#F0E442')
BLUE = COLOURS[5]
INK, PAPER, FAINT = '#1b1f24', '#fdfefe', '#8a9099'
WIDTH, HEIGHT = 5.0, 3.3  # inches; 360 points, about the width of a phone


class Panel(NamedTuple):
    """A figure of a page.

    Attributes:
        name: Name of its files, without the suffix.
        title: Title above the figure.
        alt: Alternative text: the content in words and numbers.
        svg: <svg> element in the colours of the page.
    """

    name: str
    title: str
    alt: str
    svg: str


def panel(
    directory: Path | None,
    name: str,
    title: str,
    alt: str,
    draw: Callable[[Any], None],
    *,
    height: float = HEIGHT,
    width: float = WIDTH,
    columns: int = 1,
) -> Panel:
    """Draws a figure for a page.

    Args:
        directory: Folder for the figure as PNG and SVG files; None if there are none.
        name: Name of the files without suffix, unique in the page.
        title: Title above the figure.
        alt: Alternative text: the content in words and numbers.
        draw: Function that draws on the axes, or on an array of axes if there are several columns.
        height: Height in inches.
        width: Width in inches.
        columns: Number of axes; they share their y axis.
    """
    with _style(name):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout='tight', facecolor=PAPER)
        axes = figure.subplots(1, columns, sharey=True)
        for axis in figure.axes:
            axis.spines[['top', 'right']].set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format='svg', metadata={'Date': None, 'Creator': None})
        text = buffer.getvalue()
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            figure.savefig(directory / f'{name}.png', dpi=150)
            (directory / f'{name}.svg').write_text(text, encoding='utf-8')
    return Panel(name, title, alt, vector(text, name))


@contextlib.contextmanager
def _style(salt: str) -> Iterator[None]:
    import matplotlib

    style: dict[Any, Any] = {
        'text.parse_math': False,  # class names may contain any character
        'font.size': 10,
        'font.family': 'sans-serif',
        'svg.fonttype': 'none',
        'svg.hashsalt': salt,
        'axes.facecolor': 'none',
        'axes.edgecolor': FAINT,
        'axes.labelcolor': INK,
        'text.color': INK,
        'xtick.color': FAINT,
        'ytick.color': FAINT,
        'xtick.labelcolor': INK,
        'ytick.labelcolor': INK,
        'hatch.linewidth': 0.6,
        'lines.linewidth': 1.8,
    }
    with matplotlib.rc_context(style):
        yield


def vector(text: str, name: str) -> str:
    """Converts an SVG document of Matplotlib to an element of a page, in the colours of the page.

    Args:
        text: SVG document.
        name: Prefix of every id, unique in the page.
    """
    element = text[text.index('<svg') :]
    element = re.sub(r'<metadata>.*?</metadata>', '', element, flags=re.DOTALL)
    element = re.sub(r'\s(width|height)="[\d.]+pt"', '', element, count=2)
    element = re.sub(r'(\sid="|href="#|url\(#)', rf'\g<1>{name}-', element)
    # The page has its own blue in dark mode.
    for colour, replacement in ((INK, 'currentColor'), (BLUE.lower(), 'var(--blue)')):
        element = element.replace(colour, replacement)
    return element.replace(f'fill: {PAPER}', 'fill: none').strip()
