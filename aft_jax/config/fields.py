"""The parts of a config table: a field with its default and its meaning, and the checks of single values."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from aft_jax.errors import UserError, suggestion

# The largest perturbation that makes sense for pixels in [0, 1].
LARGEST_LINF = 1.0


class Check(NamedTuple):
    """A rule for the value of one field.

    Attributes:
        rule: Text for the user, such as 'must be positive'.
        holds: Predicate that is true for the allowed values.
        explain: Function of a field's name and its wrong value that returns the error message. The default message is
            'FIELD=VALUE RULE.'
    """

    rule: str
    holds: Callable[[Any], bool]
    explain: Callable[[str, Any], str] | None = None

    def verify(self, field: str, value: Any) -> None:
        """Checks a value.

        Raises:
            UserError: The value is not allowed.
        """
        if not self.holds(value):
            raise UserError(self.explain(field, value) if self.explain else f'{field}={value!r} {self.rule}.')


class Field(NamedTuple):
    """A field of the config.

    Attributes:
        default: Default value. A type, such as `float`, stands for an empty field that a preset fills.
        doc: Meaning of the field, for --help-config.
        check: Rule for its value, or None if every value of the default's type is allowed.
        presets: Values by preset, for an empty field.
    """

    default: Any
    doc: str
    check: Check | None = None
    presets: dict[str, Any] | None = None


def split_names(text: str) -> list[str]:
    """Splits a comma list: 'aft, ft' gives ['aft', 'ft']. Each name occurs once, in the order of its first use."""
    return list(dict.fromkeys(name.strip() for name in text.split(',') if name.strip()))


def one_of(*choices: str | int) -> Check:
    """Builds the check that a value is one of the choices. The error message suggests the nearest choice."""
    names = [str(choice) for choice in choices]
    listed = ', '.join(names)

    def explain(field: str, value: Any) -> str:
        return f'{field}={value!r} does not exist; choose one of {listed}.{suggestion(str(value), names)}'

    return Check(f'must be one of {listed}', lambda value: value in choices, explain)


def list_of(*choices: str) -> Check:
    """Builds the check that a value is a sequence of choices, possibly empty."""
    choice = one_of(*choices)

    def explain(field: str, values: Sequence[str]) -> str:
        assert choice.explain
        return choice.explain(field, next(value for value in values if not choice.holds(value)))

    return Check(f'must be a list of {", ".join(choices)}', lambda values: all(map(choice.holds, values)), explain)


def names_of(*choices: str) -> Check:
    """Builds the check that a value is a comma list of choices, possibly empty."""
    sequence = list_of(*choices)

    def explain(field: str, text: str) -> str:
        assert sequence.explain
        return sequence.explain(field, split_names(text))

    rule = f'must be a comma list of {", ".join(choices)}'
    return Check(rule, lambda text: sequence.holds(split_names(text)), explain)


def each(check: Check) -> Check:
    """Builds the check that a sequence has one value or more, and that each of them passes `check`."""
    return Check(f'{check.rule}, one or more', lambda values: len(values) > 0 and all(map(check.holds, values)))


def between(smallest: int, largest: int, written: str = '') -> Check:
    """Builds the check that smallest <= value <= largest. `written` is how the message writes `largest`."""
    return Check(f'must lie between {smallest} and {written or largest}', lambda value: smallest <= value <= largest)


def at_least(smallest: int) -> Check:
    """Builds the check that value >= smallest."""
    return Check(f'must be at least {smallest}', lambda value: value >= smallest)


def _explain_pixels(field: str, size: float) -> str:
    if size <= 0:
        return f'{field}={size:g} must be positive.'
    # A value above 1 was meant in units of 1/255.
    return f'{field}={size:g} is in units of [0, 1] pixels; {size:g}/255 is written as {size / 255:.6f}.'


POSITIVE = Check('must be positive', lambda value: value > 0)
NOT_NEGATIVE = Check('must not be negative', lambda value: value >= 0)
OPEN_SHARE = Check('must lie strictly between 0 and 1', lambda value: 0 < value < 1)
POSITIVE_SHARE = Check('is a share: above 0 and at most 1', lambda value: 0 < value <= 1)
SHARE_OR_ZERO = Check('is a share: at least 0 and at most 1', lambda value: 0 <= value <= 1)
BELOW_ONE = Check('must be at least 0 and below 1', lambda value: 0 <= value < 1)
IN_PIXELS = Check(
    'must be positive and at most 1, the range of the pixels', lambda value: 0 < value <= LARGEST_LINF, _explain_pixels
)
RISING_POSITIVE = Check(
    'must be positive numbers that rise, one or more',
    lambda values: len(values) > 0 and min(values) > 0 and list(values) == sorted(set(values)),
)
