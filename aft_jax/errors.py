"""Errors that carry a sentence for the user."""


class UserError(Exception):
    """A mistake of the user's: one clear sentence that says what to do.

    The command line prints the sentence and exits with status 2, without a traceback.
    """
