"""Gathers finished runs into one table: a row a run and defense, `none` for the infected model itself.

The columns are the contract of every table in docs/results; shares in 0..1, times in seconds.
"""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from aft_jax.errors import UserError

Row = dict[str, Any]
COLUMNS = (
    *('dataset', 'model', 'attack', 'label_mode', 'defense', 'seed', 'clean_share'),
    *('acc', 'asr', 'ra', 'der', 'seconds'),
)
# What is to be known of the infected models alone; `attack` none is the benign control.
INFECTED_COLUMNS = (
    *('dataset', 'model', 'attack', 'label_mode', 'seed'),
    *('acc', 'asr', 'ra', 'cross_acc', 'seconds'),
)
# How well a defense that holds the suspect training set found the poisoned images, round by round.
DETECTION_COLUMNS = (
    *('dataset', 'model', 'attack', 'label_mode', 'defense', 'seed'),
    *('round', 'poisoned_share', 'auc'),
)
# Where a row has them, one value a round.
DETECTIONS = ('poisoned_shares', 'aucs')


def rows(results: dict[str, Any]) -> Iterable[Row]:
    """Yields the rows of one results.json, the infected or suspect model first, with the fields of all tables."""
    fields = (*COLUMNS, *INFECTED_COLUMNS, *DETECTIONS)
    shared = {name: results[name] for name in fields if name in results}
    # A model that was there already stands in the place of the infected one, its trigger unknown.
    first = results.get('suspect', results['infected'])
    for defense, scores in [('none', first), *results['purified'].items()]:
        yield shared | {'defense': defense} | {name: scores[name] for name in fields if name in scores}


def detection_rows(table: Iterable[Row]) -> Iterable[Row]:
    """Yields a row for each round of each row whose defense looked for the poisoned images."""
    for row in table:
        rounds = zip(*(row.get(name, ()) for name in DETECTIONS), strict=True)
        for number, (share, auc) in enumerate(rounds, 1):
            yield row | {'round': number, 'poisoned_share': share, 'auc': auc}


def to_csv(table: Iterable[Row], columns: Sequence[str] = COLUMNS) -> str:
    """Returns these columns of the table as CSV with a heading; what was not measured is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction='ignore', lineterminator='\n')
    writer.writeheader()
    for row in table:
        writer.writerow({name: round(v, 6) if isinstance(v, float) else v for name, v in row.items()})
    return text.getvalue()


def read(workdirs: Iterable[Path]) -> list[Row]:
    """Returns the rows of all finished runs.

    Raises:
        UserError: A directory holds no results.json, or a damaged one.
    """
    table: list[Row] = []
    for workdir in workdirs:
        path = workdir / 'results.json'
        try:
            table += rows(json.loads(path.read_text()))
        except OSError:
            raise UserError(f'{path} cannot be read: the run has not finished, or {workdir} is not a run.') from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f'{path} is damaged; delete it and start its run again.') from None
    return table
