"""A figure of a page: drawn by Matplotlib, with an alternative text that says what is seen.

Ink is one colour and paper another, which `vector` turns into the page's own, so that a figure is readable in light and
in dark.
"""

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Okabe-Ito, told apart by colour-blind readers; markers, lines or hatches say the same in grey print.
COLOURS = ('#595959', '#56B4E9', '#D55E00', '#009E73', '#E69F00', '#0072B2', '#CC79A7', '#F0E442')
BLUE = COLOURS[5]
INK, PAPER, FAINT = '#1b1f24', '#fdfefe', '#8a9099'
WIDTH, HEIGHT = 5.0, 3.3  # inches; 360 points, about the width of a phone


class Panel(NamedTuple):
    """A figure as the page holds it.

    Attributes:
        name: Of its files, without the ending.
        title: Shown above it.
        alt: What is seen, for those who do not see it.
        svg: An <svg> element in the page's colours.
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
    height: float = HEIGHT,
    width: float = WIDTH,
    columns: int = 1,
) -> Panel:
    """Draws a figure for a page.

    Args:
        directory: Where it is written as PNG and SVG too, or None.
        name: Of the files, and of the figure in the page, without the ending.
        title: Shown above it.
        alt: What is seen.
        draw: Given the axes, or an array of them where there are several.
        height: In inches.
        width: Likewise.
        columns: Of axes, which share what is beside them.

    Returns:
        The figure.
    """
    with _style(name):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout='tight', facecolor=PAPER)
        axes = figure.subplots(1, columns, sharey=True)
        for one in figure.axes:
            one.spines[['top', 'right']].set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format='svg', metadata={'Date': None, 'Creator': None})
        text = buffer.getvalue()
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            figure.savefig(directory / f'{name}.png', dpi=150)
            (directory / f'{name}.svg').write_text(text)
    return Panel(name, title, alt, vector(text, name))


@contextlib.contextmanager
def _style(salt: str) -> Iterator[None]:
    import matplotlib

    wanted: dict[Any, Any] = {
        'text.parse_math': False,  # class names may hold any sign
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
    with matplotlib.rc_context(wanted):
        yield


def vector(text: str, name: str) -> str:
    """Returns Matplotlib's SVG document as an element of a page: its ink is the page's, and its names are its own.

    Args:
        text: The document.
        name: Unique in the page; put before every id.
    """
    element = text[text.index('<svg') :]
    element = re.sub(r'<metadata>.*?</metadata>', '', element, flags=re.DOTALL)
    element = re.sub(r'\s(width|height)="[\d.]+pt"', '', element, count=2)
    element = re.sub(r'(\sid="|href="#|url\(#)', rf'\g<1>{name}-', element)
    # In the dark the page has another blue.
    for colour, theirs in ((INK, 'currentColor'), (BLUE.lower(), 'var(--blue)')):
        element = element.replace(colour, theirs)
    return element.replace(f'fill: {PAPER}', 'fill: none').strip()
