"""Checks of single fields, each of which says in one sentence what is wrong."""

from collections.abc import Iterable
from typing import Any

import ml_collections

from aft_jax.errors import UserError, suggestion

# The largest budget that still makes sense for images in [0, 1].
LARGEST_LINF = 1.0


def names(text: str) -> list[str]:
    """Returns ['aft', 'ft'] for 'aft,ft', each name once."""
    return list(dict.fromkeys(name.strip() for name in text.split(',') if name.strip()))


def one_of(field: str, found: str | int, allowed: Iterable) -> None:
    """Checks that a value is one of those allowed; the sentence suggests a near one."""
    allowed = tuple(allowed)
    if found in allowed:
        return
    known = [str(a) for a in allowed]
    raise UserError(
        f'{field}={found!r} does not exist; choose one of {", ".join(known)}.{suggestion(str(found), known)}'
    )


def share(config: ml_collections.ConfigDict, field: str) -> None:
    """Checks that a field lies strictly between 0 and 1."""
    found = value(config, field)
    if not 0 < found < 1:
        raise UserError(f'{field}={found} must lie strictly between 0 and 1.')


def value(config: ml_collections.ConfigDict, field: str) -> Any:
    """Returns the value of a field such as 'attack.sig.delta'."""
    for name in field.split('.'):
        config = config[name]
    return config


def positive(config: ml_collections.ConfigDict, *fields: str) -> None:
    """Checks that fields are above 0."""
    for field in fields:
        if value(config, field) <= 0:
            raise UserError(f'{field}={value(config, field)} must be positive.')


def not_negative(config: ml_collections.ConfigDict, *fields: str) -> None:
    """Checks that fields are 0 or more."""
    for field in fields:
        if value(config, field) < 0:
            raise UserError(f'{field}={value(config, field)} must not be negative.')


def in_pixels(field: str, size: float) -> None:
    """Checks a budget or amplitude in [0, 1] pixels; a value above 1 was surely meant in units of 1/255."""
    if size > LARGEST_LINF:
        raise UserError(f'{field}={size:g} is in units of [0, 1] pixels; {size:g}/255 is written as {size / 255:.6f}.')
    if size <= 0:
        raise UserError(f'{field}={size:g} must be positive.')
