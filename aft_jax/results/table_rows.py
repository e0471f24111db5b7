"""The rows of tables of many runs, one for each run and defense; the defense `none` is the model that was not purified.

The columns are the contract of every table in docs/results. Shares are in 0..1 and times in seconds.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from aft_jax.config import UNPURIFIED
from aft_jax.errors import UserError
from aft_jax.results import record
from aft_jax.results.record import Results
from aft_jax.results.workdir import RunFiles

Row = dict[str, Any]
COLUMNS = (
    *('dataset', 'model', 'attack', 'label_mode', 'defense', 'seed', 'clean_share'),
    *('acc', 'asr', 'ra', 'der', 'seconds'),
)
# Columns of the table of infected models; the attack `none` is the benign control.
INFECTED_COLUMNS = (
    *('dataset', 'model', 'attack', 'label_mode', 'seed'),
    *('acc', 'asr', 'ra', 'cross_acc', 'seconds'),
)
# Columns of the table of defenses that detect poisoned images in the untrusted training set, a row for each round.
DETECTION_COLUMNS = (
    *('dataset', 'model', 'attack', 'label_mode', 'defense', 'seed'),
    *('round', 'poisoned_share', 'auc'),
)
# Fields with one value for each round.
DETECTIONS = ('poisoned_shares', 'aucs')


def rows(results: Results) -> Iterable[Row]:
    """Yields the rows of one run with the fields of all tables, the first model first."""
    fields = (*COLUMNS, *INFECTED_COLUMNS, *DETECTIONS)
    for defense, scores in [(UNPURIFIED, results.initial), *results.purified.items()]:
        values = scores.to_json()
        yield results.setting._asdict() | {'defense': defense} | {n: values[n] for n in fields if n in values}


def detection_rows(table: Iterable[Row]) -> Iterable[Row]:
    """Yields a row for each round of each defense that detects poisoned images."""
    for row in table:
        rounds = zip(*(row.get(name, ()) for name in DETECTIONS), strict=True)
        for number, (share, auc) in enumerate(rounds, 1):
            yield row | {'round': number, 'poisoned_share': share, 'auc': auc}


def to_csv(table: Iterable[Row], columns: Sequence[str] = COLUMNS) -> str:
    """Formats some columns of a table as CSV with a heading. Values that do not exist are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction='ignore', lineterminator='\n')
    writer.writeheader()
    for row in table:
        writer.writerow({name: round(v, 6) if isinstance(v, float) else v for name, v in row.items()})
    return text.getvalue()


def read(workdirs: Iterable[Path]) -> list[Row]:
    """Reads the rows of finished runs.

    Raises:
        UserError: A directory has no results.json, or a damaged one.
    """
    table: list[Row] = []
    for workdir in workdirs:
        path = RunFiles(workdir).results
        try:
            table += rows(record.read(path))
        except OSError:
            raise UserError(f'{path} cannot be read: the run has not finished, or {workdir} is not a run.') from None
        except ValueError:
            raise UserError(f'{path} is damaged; delete it and start its run again.') from None
    return table
