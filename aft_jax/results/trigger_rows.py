"""The rows of runs with random triggers, and draws.csv: a row for each run, with its trigger and all its scores."""

from collections.abc import Iterable
from pathlib import Path

import ml_collections

from aft_jax.config import UNPURIFIED
from aft_jax.results import record, table_rows
from aft_jax.results.drawn_trigger import DrawnTrigger
from aft_jax.results.record import Results
from aft_jax.results.table_rows import Row
from aft_jax.results.workdir import RunFiles

# Columns of draws.csv. DEFENSE_acc, DEFENSE_asr and DEFENSE_ra of each defense follow.
COLUMNS = (
    *('dataset', 'model', 'seed', 'draw', 'family', 'trigger', 'label_mode', 'poisoned_share'),
    *('acc', 'asr'),
)
SCORES = ('acc', 'asr', 'ra')


def read(runs: Iterable[tuple[Path, ml_collections.ConfigDict]]) -> list[Row]:
    """Reads the rows of finished runs with random triggers.

    Args:
        runs: Work directory and config of each run. The attack of each is 'random'.

    Raises:
        OSError, ValueError: A results.json is missing or damaged.
    """
    table: list[Row] = []
    for directory, config in runs:
        files = RunFiles(directory)
        results = record.read(files.results)
        trigger = results.trigger or DrawnTrigger.of_manifest(config.attack.random.seed, files.poison_manifest)
        table += rows(results, trigger, config.attack.poisoned_share)
    return table


def rows(results: Results, trigger: DrawnTrigger, poisoned_share: float) -> Iterable[Row]:
    """Yields the rows of `table_rows.rows`, with the trigger and the scores before any defense in each of them.

    Args:
        results: Results of a run.
        trigger: Its trigger.
        poisoned_share: Share of the training images that were poisoned.
    """
    facts = {
        'draw': trigger.draw,
        'family': trigger.family,
        'trigger': trigger.description,
        'poisoned_share': poisoned_share,
        'acc_before': results.initial.acc,
        'asr_before': results.initial.asr,
    }
    for row in table_rows.rows(results):
        yield row | facts


def draws_csv(table: Iterable[Row]) -> str:
    """Formats draws.csv. A defense that was not run on a model has empty fields there.

    Args:
        table: Rows as `read` returns them: those of one run together, its first model first.
    """
    columns = list(COLUMNS)
    lines: list[Row] = []
    for row in table:
        if row['defense'] == UNPURIFIED:
            lines.append(dict(row))
            continue
        scores = {f'{row["defense"]}_{score}': row[score] for score in SCORES}
        columns += [name for name in scores if name not in columns]
        lines[-1] |= scores
    return table_rows.to_csv(lines, columns)
