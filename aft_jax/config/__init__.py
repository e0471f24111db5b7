"""The config of an experiment: its fields stand once, in the tables of this folder.

A config file starts from `default_config()` and changes what it needs. Images are in [0, 1] wherever a size or an
amplitude is configured: 8/255, not 8. `python -m aft_jax.main --help-config` prints all fields.
"""

from typing import Any, TypeVar

import ml_collections
from ml_collections import config_dict

from aft_jax.config.aft import AFT_PRESETS, AFT_SECTIONS
from aft_jax.config.experiment import FIELDS
from aft_jax.config.fields import Field, split_names
from aft_jax.models import COMBINED

__all__ = [
    'AFT_PRESETS',
    'AFT_SECTIONS',
    'FIELDS',
    'as_options',
    'default_config',
    'resolve',
    'split_names',
    'table_config',
]

Options = TypeVar('Options', bound=tuple)
# The name of the attack of a benign model, and of the defense of a model that was not purified.
BENIGN = UNPURIFIED = 'none'


def default_config() -> ml_collections.ConfigDict:
    """Builds the config in which every field has its default value."""
    return ml_collections.ConfigDict(_defaults(FIELDS))


def _defaults(table: dict[str, Any]) -> dict[str, Any]:
    """Converts a table of fields to their defaults. An empty field becomes a placeholder of its type."""
    values: dict[str, Any] = {}
    for name, entry in table.items():
        if not isinstance(entry, Field):
            values[name] = _defaults(entry)
        elif isinstance(entry.default, type):
            values[name] = config_dict.placeholder(entry.default)
        else:
            values[name] = entry.default
    return values


def resolve(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Copies a config and sets every value that it leaves open: those of presets, and names with a depth.

    The presets of the AFT_SECTIONS must be among AFT_PRESETS. With a `model.factory` or `model.torch` the name
    becomes theirs: config.json and the column `model` of the results have always held it there.
    """
    resolved = ml_collections.ConfigDict(config.to_dict())
    for name in AFT_SECTIONS:
        options = resolved[name]
        for field, value in AFT_PRESETS[options.preset].items():
            if options[field] is None:
                options[field] = value
    if resolved.model.name in COMBINED:
        resolved.model.name, resolved.model.depth = COMBINED[resolved.model.name]
    if resolved.model.factory or resolved.model.torch:
        resolved.model.name = resolved.model.factory or resolved.model.torch
    return resolved


def table_config(
    experiments: dict[str, ml_collections.ConfigDict],
    label_modes: str = 'all2one,all2all',
    seeds: tuple[int, ...] = (0, 1, 2),
    stages: tuple[str, ...] = ('infect', 'purify', 'report'),
    defenses: str = 'ft,aft',
    select: str = '',
) -> ml_collections.ConfigDict:
    """Builds the config of a table (see `aft_jax.pipeline.grid`). An empty `select` selects all experiments."""
    return ml_collections.ConfigDict(
        {
            'experiments': experiments,
            'select': select or ','.join(experiments),
            'label_modes': label_modes,
            'seeds': seeds,
            'stages': stages,
            'defenses': defenses,
        }
    )


def as_options(kind: type[Options], section: ml_collections.ConfigDict) -> Options:
    """Converts a section of a resolved config to a NamedTuple, which is hashable and typed.

    Args:
        kind: NamedTuple whose fields are all fields of the section. The section may have more. A field that is itself
            a NamedTuple takes its own fields from the same section.
        section: Section of the config.
    """
    values = {
        name: as_options(field, section) if hasattr(field, '_fields') else section[name]
        for name, field in kind.__annotations__.items()
    }
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
