"""Aggregates the rows of many runs over seeds: mean and standard deviation, as a value or as a Markdown table."""

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aft_jax.attacks import random_trigger
from aft_jax.errors import UserError
from aft_jax.results.table_rows import COLUMNS

SCORES = ('acc', 'asr', 'ra', 'cross_acc', 'der', 'seconds')
HEADINGS = {'acc': 'ACC %', 'asr': 'ASR %', 'ra': 'RA %', 'cross_acc': 'cross ACC %', 'der': 'DER %'}
# Fields that runs must share to be averaged.
CASE = ('dataset', 'model', 'clean_share', 'attack', 'label_mode', 'defense')


class Spread(NamedTuple):
    """Mean and sample standard deviation. The deviation of a single value is None."""

    mean: float
    deviation: float | None


class Group(NamedTuple):
    """Runs of one case: its fields by name, its seeds, and the spread of each measured score.

    Runs with different random triggers are one case. Their seeds may be the same.
    """

    case: dict[str, Any]
    seeds: tuple[int, ...]
    scores: dict[str, Spread]

    @property
    def random(self) -> bool:
        """Whether these are runs with random triggers."""
        return self.case['attack'] == random_trigger.NAME


def summarise(rows: Iterable[dict[str, Any]]) -> list[Group]:
    """Groups rows, as `table_rows.rows` yields them, by case. Cases keep the order of their first rows."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[field] for field in CASE), []).append(row)
    summary = []
    for case, members in groups.items():
        scores = {}
        for score in SCORES:
            values = [row[score] for row in members if row.get(score) is not None]
            if values:
                deviation = statistics.stdev(values) if len(values) > 1 else None
                scores[score] = Spread(statistics.fmean(values), deviation)
        seeds = tuple(sorted(row['seed'] for row in members))
        summary.append(Group(dict(zip(CASE, case, strict=True)), seeds, scores))
    return summary


def read(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a table.csv and converts its numbers. An empty field, which was not measured, becomes None.

    Raises:
        UserError: It cannot be read, or is not a table of runs.
    """
    try:
        with path.open(newline='', encoding='utf-8') as file:
            reader = csv.DictReader(file)
            lines = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path} cannot be read as a table ({getattr(error, "strerror", None) or error}).') from None
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        raise UserError(f'{path} lacks the columns {", ".join(missing)}; name a table.csv that aft_jax wrote.')
    if not lines:
        raise UserError(f'{path} holds no run; name a table.csv with at least one row.')
    rows, seen = [], set()
    for number, line in enumerate(lines, 2):
        try:
            row = _typed(line)
        except ValueError as error:
            raise UserError(f'{path}, row {number}: {error}.') from None
        identity = tuple(row[field] for field in (*CASE, 'seed'))
        # Many random triggers may be planted with one seed.
        if identity in seen and row['attack'] != random_trigger.NAME:
            raise UserError(f'{path}, row {number}: an earlier row has the same run and defense; delete one of them.')
        seen.add(identity)
        rows.append(row)
    return rows


def _typed(line: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in COLUMNS:
        text = line[name]
        if text is None or None in line:
            raise ValueError('the number of fields differs from the heading')
        if name in ('dataset', 'model', 'attack', 'label_mode', 'defense'):
            row[name] = text
        elif not text and name not in ('seed', 'clean_share'):
            row[name] = None
        else:
            try:
                value = int(text) if name == 'seed' else float(text)
            except ValueError:
                raise ValueError(f'{name} is {text!r}, not a number') from None
            if not (0 <= value <= (math.inf if name in ('seed', 'seconds') else 1) and math.isfinite(value)):
                raise ValueError(f'{name} is {text}, which is out of range')
            row[name] = value
    return row


def to_markdown(groups: Sequence[Group]) -> str:
    """Formats groups as a Markdown table, with shares in percent as mean ± standard deviation.

    Scores that no group has are left out.
    """
    shown = [score for score in SCORES if any(score in group.scores for group in groups)]
    varying = [field for field in CASE if field in ('attack', 'label_mode', 'defense')]
    varying += [field for field in CASE if field not in varying and len({str(g.case[field]) for g in groups}) > 1]
    runs = 'models' if any(group.random for group in groups) else 'seeds'
    heading = [*varying, runs, *(HEADINGS.get(score, score) for score in shown)]
    lines = [_line(heading), _line(['---'] * len(varying) + ['---:'] * (len(heading) - len(varying)))]
    for group in groups:
        cells = [str(group.case[field]) for field in varying]
        cells += [str(len(group.seeds)), *(_cell(score, group.scores.get(score)) for score in shown)]
        lines.append(_line(cells))
    return '\n'.join(lines) + '\n'


def _line(cells: Sequence[str]) -> str:
    return f'| {" | ".join(cells)} |'


def _cell(score: str, spread: Spread | None) -> str:
    if spread is None:
        return ''
    scale, digits = (1, 0) if score == 'seconds' else (100, 2)
    mean = f'{scale * spread.mean:.{digits}f}'
    return mean if spread.deviation is None else f'{mean} ± {scale * spread.deviation:.{digits}f}'
