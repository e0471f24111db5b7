"""The text of --help-config: every field of the config with its default, its meaning and its rule."""

import shutil
import textwrap
from typing import Any

from aft_jax.config.fields import Field
from aft_jax.validation.fields import ALL_FIELDS

HEADING = """The fields of a config. Set them in a config file, or on the command line: --config.FIELD=VALUE.
Sizes and amplitudes of images are for pixels in [0, 1]: 8/255, not 8."""
LONGEST_LINE = 100


def config_help() -> str:
    """Builds the text, wrapped to the terminal's width."""
    width = min(shutil.get_terminal_size().columns, LONGEST_LINE)
    parts = [HEADING]
    previous = None
    for name, field in ALL_FIELDS.items():
        section = name.rpartition('.')[0]
        if section != previous:
            parts.append('')
        previous = section
        rule = f' It {field.check.rule}.' if field.check else ''
        parts.append(f'{name} = {_default(field)}')
        parts.append(textwrap.fill(field.doc + rule, width, initial_indent='    ', subsequent_indent='    '))
    return '\n'.join(parts)


def _default(field: Field) -> str:
    if field.presets is None:
        return _value(field.default)
    return ', '.join(f'{_value(value)} ({preset})' for preset, value in field.presets.items())


def _value(value: Any) -> str:
    return f'{value:.6g}' if isinstance(value, float) else repr(value)
