"""Checks that the packages of the extra `report` are installed."""

import importlib.util

from aft_jax.errors import UserError

# Modules of the extra `report`, with the names of their packages.
NEEDED = {'matplotlib': 'Matplotlib', 'jinja2': 'Jinja2', 'sklearn': 'scikit-learn'}


def available() -> bool:
    """Checks whether Matplotlib is installed."""
    return not missing('matplotlib')


def missing(*modules: str) -> str:
    """Lists the modules that are not installed, as 'Jinja2 and Matplotlib'; '' if there are none."""
    return ' and '.join(NEEDED[module] for module in modules if importlib.util.find_spec(module) is None)


def check_available() -> None:
    """Checks that all packages of the report are installed, and raises a UserError otherwise."""
    if lacking := missing(*NEEDED):
        raise UserError(
            f"the stage 'report' needs {lacking}, which is not installed: run pip install 'aft_jax[report]', or leave "
            "the stage out with --config.stages=\"('infect','purify')\"."
        )
