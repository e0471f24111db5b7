"""A table's config, and the experiments it stands for.

A table config has, beside `experiments` (a config of `aft_jax.config.default_config` by name, usually an attack's):

    select       which of them, comma-separated, in the order of the table
    label_modes  'all2one,all2all' or one of the two; a benign control is run once
    seeds        such as (0, 1, 2)
    stages       as in an experiment's config, such as ('infect',) for the infected models alone
    defenses     likewise
"""

from pathlib import Path
from typing import NamedTuple

import ml_collections

from aft_jax import validation
from aft_jax.errors import UserError, suggestion

FIELDS = ('experiments', 'select', 'label_modes', 'seeds', 'stages', 'defenses')


class Experiment(NamedTuple):
    """One cell of a table: the name of its work directory, and its config."""

    name: str
    config: ml_collections.ConfigDict


def expand(table: ml_collections.ConfigDict) -> list[Experiment]:
    """Returns the experiments of a table, all of the first seed before those of the second.

    Raises:
        UserError: The table, or one of its experiments, cannot be carried out.
    """
    missing = [field for field in FIELDS if field not in table]
    if missing:
        raise UserError(
            f'the table config lacks {", ".join(missing)}; make it with aft_jax.pipeline.grid.table_config().'
        )
    chosen = validation.names(table.select)
    for name in chosen:
        if name not in table.experiments:
            raise UserError(
                f'select={name!r} is none of this table: {", ".join(table.experiments)}.'
                f'{suggestion(name, table.experiments)}'
            )
    if not table.seeds or not chosen:
        raise UserError('the table has no experiment: seeds and select must name at least one each.')
    found = []
    for seed in dict.fromkeys(table.seeds):
        for name in chosen:
            benign = table.experiments[name].attack.name == 'none'
            for mode in validation.names(table.label_modes)[: 1 if benign else None]:
                config = table.experiments[name].copy_and_resolve_references()
                config.seed = seed
                config.attack.label_mode = mode
                config.stages = table.stages
                config.defenses = table.defenses
                validation.validate(config)
                found.append(Experiment(f'{name}-{seed}' if benign else f'{name}-{mode}-{seed}', config))
    if not found:
        raise UserError("label_modes is empty; name 'all2one', 'all2all' or both, comma-separated.")
    return found


def share(experiments: list[Experiment], shard: str) -> list[Experiment]:
    """Returns every n-th experiment from the i-th, for shard 'i/n' (i from 0).

    Raises:
        UserError: The shard is not of that form.
    """
    first, _, count = shard.partition('/')
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise UserError(f'--shard={shard} must be i/n with i from 0 to n - 1, such as --shard=0/2 and --shard=1/2.')
    return experiments[int(first) :: int(count)]


def directory_of(root: Path, experiment: Experiment) -> Path:
    """Returns an experiment's work directory under the table's."""
    return root / 'runs' / experiment.name
