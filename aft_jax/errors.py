"""Errors that carry a sentence for the user."""

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
