"""Errors that carry a sentence for the user."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """A mistake of the user's: one clear sentence that says what to do.

    The command line prints the sentence and exits with status 2, without a traceback.

    Attributes:
        shared: Whether every process of the job raises it, so that one of them is enough to tell it.
    """

    def __init__(self, sentence: str, shared: bool = False):
        """An error that says `sentence`."""
        super().__init__(sentence)
        self.shared = shared


def user_path(text: str, field: str) -> Path:
    """Returns the path that a user wrote, with ~ expanded; `field` is where it was written."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f'{field}={text} names the home of a user who does not exist.') from error


def suggestion(value: str, allowed: Iterable[str]) -> str:
    """Returns ' Did you mean ...?' for the nearest allowed value, or '' when none is near."""
    near = difflib.get_close_matches(value, list(allowed), n=1)
    return f' Did you mean {near[0]!r}?' if near else ''


def check_choice(flag: str, value: str, allowed: Iterable[str]) -> None:
    """Raises the user's mistake where a flag names what does not exist."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise UserError(f'{flag}={value} does not exist; choose from {", ".join(allowed)}.{suggestion(value, allowed)}')
