"""The cases of a table of many runs: their rows, the best defenses, and the means over all cases."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from aft_jax.config import BENIGN, UNPURIFIED
from aft_jax.report.verdict import ERASED
from aft_jax.results.aggregate import Group
from aft_jax.results.record import featured, percent

# The better end of each score that is compared.
BEST = {'acc': max, 'asr': min, 'ra': max, 'der': max}


class Case(NamedTuple):
    """Runs of one attack and label mode.

    Attributes:
        dataset: Name of the data set.
        model: Name of the model.
        attack: Name of the attack; 'none' for the benign control.
        label_mode: Label mode; '' for the benign control, which has none.
        rows: Runs by defense; `none` is the model that was not purified. A clean share that differs from the usual one
            is part of the name.
    """

    dataset: str
    model: str
    attack: str
    label_mode: str
    rows: dict[str, Group]


def gather(groups: Sequence[Group]) -> list[Case]:
    """Collects the groups by case, in their order. The clean share of the first group is the usual one."""
    usual = groups[0].case['clean_share']
    benign_modes = {group.case['label_mode'] for group in groups if group.case['attack'] == BENIGN}
    cases: dict[tuple[str, ...], Case] = {}
    for group in groups:
        fields = group.case
        mode = '' if fields['attack'] == BENIGN and len(benign_modes) == 1 else fields['label_mode']
        key = fields['dataset'], fields['model'], fields['attack'], mode
        name = fields['defense']
        if fields['clean_share'] != usual:
            name += f' ({100 * fields["clean_share"]:g} %)'
        cases.setdefault(key, Case(*key, {})).rows[name] = group
    return list(cases.values())


def best(rows: dict[str, dict[str, float]]) -> dict[str, set[str]]:
    """Finds the best of several defenses by each score. Defenses with the same printed value share the first place.

    Args:
        rows: Shares by score, by defense, without the model that was not purified.
    """
    winners: dict[str, set[str]] = {}
    for score, better in BEST.items():
        shown = {name: f'{100 * scores[score]:.1f}' for name, scores in rows.items() if score in scores}
        if len(shown) > 1:
            top = better(shown.values(), key=float)
            winners[score] = {name for name, text in shown.items() if text == top}
    return winners


def overall(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Computes the means of each defense over the cases with an attack.

    Only defenses that were run in all of these cases compete for the best mean.
    """
    attacked = [case for case in cases if case.attack != BENIGN]
    names = list(dict.fromkeys(name for case in attacked for name in case.rows))
    rows = []
    for name in names:
        groups = [case.rows[name] for case in attacked if name in case.rows]
        means = {
            score: statistics.fmean(group.scores[score].mean for group in groups)
            for score in BEST
            if all(score in group.scores for group in groups)
        }
        rates = [group.scores['asr'].mean for group in groups if 'asr' in group.scores]
        rows.append(
            {
                'name': name,
                'defense': groups[0].case['defense'],
                'count': len(groups),
                'means': means,
                'worst': max(rates, default=None),
                'erased': sum(rate <= ERASED for rate in rates),
            }
        )
    everywhere = {
        row['name']: row['means'] for row in rows if row['defense'] != UNPURIFIED and row['count'] == len(attacked)
    }
    marked = best(everywhere)
    return [row | {'best': {score for score, names in marked.items() if row['name'] in names}} for row in rows]


def sentence(cases: Sequence[Case]) -> str:
    """Writes the mean result of the featured defense over all cases with an attack in one sentence."""
    rows = overall(cases)
    count = sum(case.attack != BENIGN for case in cases)
    many = f'{count} case{"s" if count > 1 else ""}'
    defenses = [row['defense'] for row in rows if row['defense'] != UNPURIFIED]
    chosen = next((row for row in rows if defenses and row['defense'] == featured(defenses)), None)
    before: dict[str, float] = {}
    if chosen is not None:
        shared = overall([case for case in cases if chosen['name'] in case.rows])
        before = next((row['means'] for row in shared if row['defense'] == UNPURIFIED), {})
    if chosen is None or not {'acc', 'asr'} <= before.keys() & chosen['means'].keys():
        return f'{many} of an attack.' if count else 'Models without an attack.'
    after = chosen['means']
    over = f'over {many}' if chosen['count'] == count else f'over {chosen["count"]} of {many}'
    return (
        f'Under {chosen["name"].upper()}, {percent(after["asr"])} of triggered images are classified as the target '
        f'label, on average {over} ({percent(before["asr"])} before), at a clean accuracy of {percent(after["acc"])} '
        f'({percent(before["acc"])} before).'
    )


def empty(cases: Sequence[Case], attacks: Sequence[str], modes: Sequence[str]) -> list[tuple[int, int]]:
    """Lists the combinations of an attack and a label mode, as indices, that have no case."""
    existing = {(case.attack, case.label_mode) for case in cases}
    return [
        (i, j)
        for i, attack in enumerate(attacks)
        for j, mode in enumerate(modes)
        if (attack, mode) not in existing and (attack, '') not in existing
    ]
