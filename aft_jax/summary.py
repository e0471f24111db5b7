"""A table of many runs, read by people: mean and standard deviation over seeds."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

SCORES = ('acc', 'asr', 'ra', 'cross_acc', 'der', 'seconds')
HEADINGS = {'acc': 'ACC %', 'asr': 'ASR %', 'ra': 'RA %', 'cross_acc': 'cross ACC %', 'der': 'DER %'}
# What runs must share to be averaged.
CASE = ('dataset', 'model', 'clean_share', 'attack', 'label_mode', 'defense')


class Spread(NamedTuple):
    """Mean and sample standard deviation; the latter is None for a single value."""

    mean: float
    deviation: float | None


class Group(NamedTuple):
    """The runs of one case: its fields by name, its seeds, and the spread of each score that was measured."""

    case: dict[str, Any]
    seeds: tuple[int, ...]
    scores: dict[str, Spread]


def summarise(rows: Iterable[dict[str, Any]]) -> list[Group]:
    """Returns the groups of rows (as `collect.rows` yields them), in the order in which their cases come first."""
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


def to_markdown(groups: Sequence[Group]) -> str:
    """Returns a Markdown table, shares in percent as mean ± standard deviation; scores that nobody has are left out."""
    shown = [score for score in SCORES if any(score in group.scores for group in groups)]
    varying = [field for field in CASE if field in ('attack', 'label_mode', 'defense')]
    varying += [field for field in CASE if field not in varying and len({str(g.case[field]) for g in groups}) > 1]
    heading = [*varying, 'seeds', *(HEADINGS.get(score, score) for score in shown)]
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
