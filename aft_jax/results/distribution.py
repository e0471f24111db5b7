"""The distribution of the ASR that each defense leaves on many random triggers, over all of them and by family.

A mean over attacks hides the worst case. A model counts if its ASR before any defense is at least `COUNTED_ASR`. The
others hardly have a backdoor that a defense could erase, and their number is given.

Quantiles are those of `numpy.quantile` with its default method 'linear'. The quantile q of n sorted values lies at the
position q (n - 1), counted from 0, linear between neighbours.
"""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from aft_jax.attacks.random_trigger import FAMILIES
from aft_jax.config import UNPURIFIED
from aft_jax.results import table_rows
from aft_jax.results.table_rows import Row

COUNTED_ASR = 0.8
# Shares of triggers with more ASR left than these are given.
LEVELS = (0.05, 0.1, 0.5)
ALL = 'all'
CASE = ('dataset', 'model', 'clean_share', 'defense')
COLUMNS = (
    *(*CASE, 'family', 'counted', 'not_counted'),
    *('asr_median', 'asr_p90', 'asr_max', *(f'asr_above_{100 * level:g}' for level in LEVELS)),
    *('acc_before_mean', 'acc_lost_mean', 'acc_lost_max', 'der_mean', 'der_deviation'),
)
HEADINGS = {
    'counted': 'models',
    'not_counted': 'not counted',
    'asr_median': 'ASR median %',
    'asr_p90': 'ASR p90 %',
    'asr_max': 'ASR worst %',
    **{f'asr_above_{100 * level:g}': f'ASR > {100 * level:g} %' for level in LEVELS},
    'acc_before_mean': 'ACC before %',
    'acc_lost_mean': 'ACC lost',
    'acc_lost_max': 'ACC lost, worst',
    'der_mean': 'DER %',
}


class Distribution(NamedTuple):
    """Models with random triggers of one family after one defense.

    Attributes:
        case: Values of the fields `CASE`.
        name: Name of the defense, with those fields that distinguish it from others of the table.
        family: Family of the triggers, or 'all'.
        not_counted: Number of models whose ASR before any defense was below `COUNTED_ASR`.
        rates: ASR that is left on each counted model, sorted.
        scores: Values of the columns from 'asr_median' on. A value that does not exist is missing.
    """

    case: dict[str, Any]
    name: str
    family: str
    not_counted: int
    rates: tuple[float, ...]
    scores: dict[str, float]

    @property
    def unpurified(self) -> bool:
        """Whether these are the models before any defense."""
        return self.case['defense'] == UNPURIFIED


def summarise(table: Iterable[Row]) -> list[Distribution]:
    """Computes the distribution of each defense, first over all triggers and then family by family.

    Families without a model are left out. Defenses keep the order of their first rows.

    Args:
        table: Rows as `trigger_rows.read` returns them.
    """
    table = list(table)
    summary = []
    for family in (ALL, *FAMILIES):
        groups: dict[tuple, list[Row]] = {}
        for row in table:
            if family in (ALL, row['family']):
                groups.setdefault(tuple(row[field] for field in CASE), []).append(row)
        summary += [_distribution(family, members, table) for members in groups.values()]
    return summary


def _distribution(family: str, members: Sequence[Row], table: Sequence[Row]) -> Distribution:
    case = {field: members[0][field] for field in CASE}
    counted = [row for row in members if row['asr_before'] is not None and row['asr_before'] >= COUNTED_ASR]
    rates = tuple(sorted(row['asr'] for row in counted))
    scores = _scores(counted, rates) if counted else {}
    return Distribution(case, _name(case, table), family, len(members) - len(counted), rates, scores)


def _scores(counted: Sequence[Row], rates: Sequence[float]) -> dict[str, float]:
    scores = {
        'asr_median': float(np.quantile(rates, 0.5)),
        'asr_p90': float(np.quantile(rates, 0.9)),
        'asr_max': max(rates),
        **{f'asr_above_{100 * level:g}': share_above(rates, level) for level in LEVELS},
        'acc_before_mean': statistics.fmean(row['acc_before'] for row in counted),
    }
    if counted[0]['defense'] == UNPURIFIED:
        return scores
    lost = [row['acc_before'] - row['acc'] for row in counted]
    scores |= {'acc_lost_mean': statistics.fmean(lost), 'acc_lost_max': max(lost)}
    ratings = [row['der'] for row in counted if row.get('der') is not None]
    if ratings:
        scores['der_mean'] = statistics.fmean(ratings)
    if len(ratings) > 1:
        scores['der_deviation'] = statistics.stdev(ratings)
    return scores


def share_above(rates: Sequence[float], level: float) -> float:
    """Computes the share of rates that are larger than `level`; at least one rate."""
    return sum(rate > level for rate in rates) / len(rates)


def _name(case: dict[str, Any], table: Sequence[Row]) -> str:
    """Names a defense. A clean share that differs from the first one is part of the name, as on the page of a table."""
    name = case['defense']
    if case['clean_share'] != table[0]['clean_share']:
        name += f' ({100 * case["clean_share"]:g} %)'
    more = [case[field] for field in ('dataset', 'model') if len({row[field] for row in table}) > 1]
    return ', '.join([name, *more])


def to_csv(distributions: Iterable[Distribution]) -> str:
    """Formats distribution.csv. Shares, losses and deviations are in 0..1, as in table.csv."""
    lines = (
        d.case | {'family': d.family, 'counted': len(d.rates), 'not_counted': d.not_counted} | d.scores
        for d in distributions
    )
    return table_rows.to_csv(lines, COLUMNS)


def cells(distribution: Distribution) -> dict[str, str]:
    """Formats the numbers of a row by column of `HEADINGS`: shares in percent, losses of ACC in percentage points.

    Numbers that do not exist are ''.
    """
    texts = {'counted': str(len(distribution.rates)), 'not_counted': str(distribution.not_counted)}
    for column in list(HEADINGS)[len(texts) :]:
        value = distribution.scores.get(column)
        # Adding 0.0 turns a -0.0 into 0.0.
        texts[column] = '' if value is None else f'{round(100 * value, 1) + 0.0:.1f}'
    if 'der_deviation' in distribution.scores:
        texts['der_mean'] += f' ± {100 * distribution.scores["der_deviation"]:.1f}'
    return texts


def counts(distributions: Iterable[Distribution]) -> tuple[int, int]:
    """Adds up how many models with a random trigger count, and how many do not."""
    first = [d for d in distributions if d.unpurified and d.family == ALL]
    return sum(len(d.rates) for d in first), sum(d.not_counted for d in first)


def to_markdown(distributions: Sequence[Distribution]) -> str:
    """Formats the section of table.md about random triggers; '' without any."""
    if not distributions:
        return ''
    counted, not_counted = counts(distributions)
    lines = [
        '',
        '## Random triggers',
        '',
        f'{counted} of {counted + not_counted} models count. The ASR of the others is below {100 * COUNTED_ASR:g} % '
        'before any defense. ACC lost is in percentage points. `none` is the infected model.',
        '',
        f'| {" | ".join(["family", "defense", *HEADINGS.values()])} |',
        f'| {" | ".join(["---"] * 2 + ["---:"] * len(HEADINGS))} |',
    ]
    lines += [f'| {" | ".join([d.family, d.name, *cells(d).values()])} |' for d in distributions]
    return '\n'.join(lines) + '\n'
