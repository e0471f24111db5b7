"""Whether a config has the fields of the defaults, each of its kind."""

import math
from typing import Any

import ml_collections
from flax.traverse_util import flatten_dict

from aft_jax.config import default_config
from aft_jax.errors import UserError, suggestion


def validate_structure(config: ml_collections.ConfigDict) -> None:
    """Every field of the defaults, no other, each of its default's kind, and every number finite."""
    defaults, found = (flatten_dict(c.to_dict(), sep='.') for c in (default_config(), config))
    for field in found:
        if field not in defaults:
            raise UserError(f'the config has a field {field!r} that does not exist.{suggestion(field, defaults)}')
    for field, default in defaults.items():
        if field not in found:
            raise UserError(f'the config lacks the field {field!r}; start from aft_jax.config.default_config().')
        value = found[field]
        if not _fits(value, default):
            kind = 'a finite number' if isinstance(default, float) else f'of the kind of {default!r}'
            raise UserError(f'{field}={value!r} should be {kind}.')


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of its default's kind, and a finite one where it is a number."""
    match default:
        case tuple():
            return isinstance(value, tuple | list) and all(_fits(item, default[0]) for item in value)
        case bool() | str():
            return isinstance(value, type(default))
        case int():
            return isinstance(value, int) and not isinstance(value, bool)
        case float():
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    # An AFT field, whose kind its placeholder has seen to.
    return not isinstance(value, float) or math.isfinite(value)
