"""Checks each field of a config by itself: its name, its type, and the rule beside its default."""

import math
from typing import Any

import ml_collections
from flax.traverse_util import flatten_dict

from aft_jax import attacks
from aft_jax.config import FIELDS, default_config
from aft_jax.config.fields import Check, Field, names_of, one_of
from aft_jax.defenses import DEFENSES
from aft_jax.errors import UserError, suggestion
from aft_jax.training.data_feed import PLACEMENTS
from aft_jax.training.optimiser import SCHEDULES


def _choices(name: str) -> Check | None:
    """Returns the check of a field whose choices belong to layers that the config may not import, or None."""
    match name:
        case 'attack.name':
            return one_of(*attacks.NAMES)
        case 'attack.label_mode':
            return one_of(*attacks.LABEL_MODES)
        case 'attack.poisoning':
            return one_of(*attacks.POISONINGS)
        case 'defenses':
            return names_of(*DEFENSES)
        case 'run.placement':
            return one_of(*PLACEMENTS)
    return one_of(*SCHEDULES) if name.endswith('.schedule') else None


# Every field by its full name, such as 'attack.sig.delta', with its check.
ALL_FIELDS: dict[str, Field] = {
    name: field._replace(check=field.check or _choices(name)) for name, field in flatten_dict(FIELDS, sep='.').items()
}


def validate_fields(config: ml_collections.ConfigDict) -> None:
    """Checks that a config has every field and no other, and that each value is of the right type and allowed.

    Raises:
        UserError: The first wrong field.
    """
    defaults, values = flatten_dict(default_config().to_dict(), sep='.'), flatten_dict(config.to_dict(), sep='.')
    for name in values:
        if name not in defaults:
            raise UserError(f'the config has a field {name!r} that does not exist.{suggestion(name, defaults)}')
    for name, default in defaults.items():
        if name not in values:
            raise UserError(f'the config lacks the field {name!r}; start from aft_jax.config.default_config().')
        if not _has_type(values[name], default):
            kind = 'a finite number' if isinstance(default, float) else f'of the type of {default!r}'
            raise UserError(f'{name}={values[name]!r} should be {kind}.')
    for name, field in ALL_FIELDS.items():
        # None: the field is empty, and its preset fills it.
        if field.check and values[name] is not None:
            field.check.verify(name, values[name])


def _has_type(value: Any, default: Any) -> bool:
    """Whether a value has its default's type. A number must be finite."""
    match default:
        case tuple():
            return isinstance(value, tuple | list) and all(_has_type(item, default[0]) for item in value)
        case bool() | str():
            return isinstance(value, type(default))
        case int():
            return isinstance(value, int) and not isinstance(value, bool)
        case float():
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    # A field of an AFT section: ml_collections has checked its type.
    return not isinstance(value, float) or math.isfinite(value)
