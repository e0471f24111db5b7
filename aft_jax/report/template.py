"""Renders the templates of this folder."""

from pathlib import Path
from typing import Any

from aft_jax.report.figure import Panel
from aft_jax.results.record import percent


def render(name: str, content: dict[str, Any]) -> str:
    """Renders a page.

    Args:
        name: Name of the template's file.
        content: Values by name. A name that the template uses and that is missing is an error.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters['percent'] = percent
    environment.filters['vector'] = _inline
    return environment.get_template(name).render(content)


def _inline(panel: Panel) -> Any:
    """Adds the alternative text to the <svg> of a panel, and marks it as HTML."""
    from markupsafe import Markup, escape

    return Markup(panel.svg.replace('<svg', f'<svg role="img" aria-label="{escape(panel.alt)}"', 1))
