"""Exceptions that end a command in an orderly way, and the texts of their messages."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """A mistake of the user, explained in one clear sentence that says what to do.

    The command line prints the sentence and exits with status 2, without a traceback.

    Attributes:
        shared: Whether every process of the job raises the error, so that one of them is enough to print it.
    """

    def __init__(self, sentence: str, shared: bool = False):
        """Stores the sentence as the exception's text."""
        super().__init__(sentence)
        self.shared = shared


class Preempted(Exception):
    """The end of a run that a signal has stopped. Its state is saved, and the same command continues it.

    Attributes:
        signal: Name of the signal.
    """

    def __init__(self, signal: str = 'SIGTERM'):
        """Stores the name of the signal."""
        super().__init__(signal)
        self.signal = signal


def user_path(text: str, field: str) -> Path:
    """Converts a path that the user wrote, and expands ~.

    Args:
        text: The path.
        field: Name of the flag or config field, for the message.

    Raises:
        UserError: The path begins with ~NAME, and there is no user of that name. Or it has characters that the locale
            does not have, which the libraries for checkpoints cannot take.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f'{field}={ascii(text)} has characters that the locale does not have; start with LC_ALL=C.UTF-8.'
        ) from None
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f'{field}={text} names the home of a user who does not exist.') from error


def nearest(value: str, allowed: Iterable[str]) -> str:
    """Finds the allowed value that is spelled most like `value`, or '' if none is similar."""
    return next(iter(difflib.get_close_matches(value, list(allowed), n=1)), '')


def suggestion(value: str, allowed: Iterable[str]) -> str:
    """Builds ' Did you mean ...?' for the nearest allowed value, or '' if none is similar."""
    near = nearest(value, allowed)
    return f' Did you mean {near!r}?' if near else ''


def check_choice(flag: str, value: str, allowed: Iterable[str]) -> None:
    """Checks the value of a flag.

    Raises:
        UserError: The value is not among those allowed.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise UserError(f'{flag}={value} does not exist; choose from {", ".join(allowed)}.{suggestion(value, allowed)}')
