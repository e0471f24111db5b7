"""Storage that can no longer be written: an error in the middle of a run becomes one sentence."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from aft_jax.errors import Preempted, UserError
from aft_jax.files import fault


@contextlib.contextmanager
def explained(claim: Path) -> Iterator[None]:
    """Raises a UserError in place of an error whose reason is that a directory cannot be written.

    Args:
        claim: File that the directory has as long as nobody removes it.
    """
    try:
        yield
    except (UserError, Preempted):
        raise
    except Exception as error:
        if not claim.exists():
            raise UserError(f'{claim.parent} was removed during the run; start it again in a new directory.') from error
        reason = fault(claim.parent, error)
        if not reason:
            raise
        raise UserError(
            f'{claim.parent} can no longer be written ({reason}); all that was saved is there: correct this, and the '
            'same command continues.'
        ) from error
