"""Checks that the packages of the extra `report` are installed."""

import importlib.util

from aft_jax.errors import UserError

# Modules of the extra `report`.
NEEDED = {'matplotlib': 'Matplotlib', 'jinja2': 'Jinja2', 'sklearn': 'scikit-learn'}


def available() -> bool:
    """Whether Matplotlib is installed."""
    return not missing('matplotlib')


def missing(*modules: str) -> str:
    """Returns the names of those that are not installed, as 'Jinja2 and Matplotlib', or ''."""
    return ' and '.join(NEEDED[module] for module in modules if importlib.util.find_spec(module) is None)


def check_available() -> None:
    """Raises UserError when something that the report needs is not installed."""
    if lacking := missing(*NEEDED):
        raise UserError(
            f"the stage 'report' needs {lacking}, not installed here: pip install 'aft_jax[report]', or leave the "
            "stage out with --config.stages=\"('infect','purify')\"."
        )
