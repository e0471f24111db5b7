"""Expands a table's config to its experiments.

A table config holds `experiments` (configs by name, usually an attack's) and

    select       experiments to run, comma-separated, in the order of the table
    label_modes  'all2one,all2all' or one of the two, where a benign control is run once; or 'own', for the label mode
                 of each experiment's config
    seeds        such as (0, 1, 2)
    stages       as in an experiment's config, such as ('infect',) for the infected models alone
    defenses     as in an experiment's config
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ml_collections

from aft_jax import validation
from aft_jax.config import BENIGN, split_names
from aft_jax.errors import UserError, suggestion

# The value of label_modes that leaves each experiment its own label mode.
OWN = 'own'
FIELDS = ('experiments', 'select', 'label_modes', 'seeds', 'stages', 'defenses')


class Experiment(NamedTuple):
    """One cell of a table: the name of its work directory, and its config."""

    name: str
    config: ml_collections.ConfigDict


def expand(table: ml_collections.ConfigDict) -> list[Experiment]:
    """Builds the experiments of a table, all of the first seed before those of the second.

    Raises:
        UserError: The table lacks a field or has no experiment, or the config of an experiment is wrong.
    """
    missing = [field for field in FIELDS if field not in table]
    if missing:
        raise UserError(f'the table config lacks {", ".join(missing)}; make it with aft_jax.config.table_config().')
    selected = split_names(table.select)
    for name in selected:
        if name not in table.experiments:
            raise UserError(
                f'select={name!r} is not in this table: {", ".join(table.experiments)}.'
                f'{suggestion(name, table.experiments)}'
            )
    if not table.seeds or not selected:
        raise UserError('the table has no experiment: seeds and select must name at least one each.')
    if not all(isinstance(seed, int) for seed in table.seeds):
        raise UserError(f'seeds={table.seeds!r} must be whole numbers, such as --config.seeds="(0,1)".')
    experiments = []
    for seed in dict.fromkeys(table.seeds):
        for name in selected:
            attack = table.experiments[name].attack
            one_mode = table.label_modes == OWN or attack.name == BENIGN
            modes = [attack.label_mode] if table.label_modes == OWN else split_names(table.label_modes)
            for mode in modes[: 1 if one_mode else None]:
                config = table.experiments[name].copy_and_resolve_references()
                config.seed = seed
                config.attack.label_mode = mode
                config.stages = table.stages
                config.defenses = table.defenses
                validation.validate(config)
                experiments.append(Experiment(f'{name}-{seed}' if one_mode else f'{name}-{mode}-{seed}', config))
    if not experiments:
        raise UserError("label_modes is empty; name 'all2one', 'all2all' or both, comma-separated, or 'own'.")
    return experiments


def share(experiments: Sequence[Experiment], shard: str) -> Sequence[Experiment]:
    """Selects every n-th experiment from the i-th, for shard 'i/n' (i from 0).

    Raises:
        UserError: The shard does not have that form.
    """
    first, _, count = shard.partition('/')
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise UserError(f'--shard={shard} must be i/n with i from 0 to n - 1, such as --shard=0/2 and --shard=1/2.')
    return experiments[int(first) :: int(count)]


def directory_of(root: Path, experiment: Experiment) -> Path:
    """Returns the work directory of an experiment. `root` is the table's."""
    return root / 'runs' / experiment.name
