"""A table of many runs as one page that needs nothing beside it: WORKDIR/index.html of a sweep.

    python -m aft_jax.report.table_page docs/results/fashion_mnist/table.csv --out page.html

    TABLE.csv   a table that a sweep or `python -m aft_jax.results` wrote
    --out       the page

Needs Matplotlib and Jinja2: pip install 'aft_jax[report]'.
"""

import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aft_jax import cli
from aft_jax.errors import UserError, user_path
from aft_jax.files import write_text
from aft_jax.report import requirements, score_bars, template
from aft_jax.report.verdict import ERASED
from aft_jax.results import aggregate
from aft_jax.results.aggregate import Group, Spread
from aft_jax.results.record import featured, percent

COLUMNS = {'acc': 'ACC', 'asr': 'ASR', 'ra': 'RA', 'der': 'DER', 'seconds': 'seconds'}
# Which end of a column is the better one; to take long is not judged.
BEST = {'acc': max, 'asr': min, 'ra': max, 'der': max}
FIRST = 'none'


class Case(NamedTuple):
    """The runs of one attack and label mode.

    Attributes:
        dataset: Of all of them.
        model: Likewise.
        attack: Its name; 'none' for the benign control.
        label_mode: '' for the benign control, which has none.
        rows: By defense, `none` for the model that was not purified; the name tells the clean share too where it is
            not the usual one.
    """

    dataset: str
    model: str
    attack: str
    label_mode: str
    rows: dict[str, Group]


def write_table_page(path: Path, groups: Sequence[Group]) -> None:
    """Writes the page.

    Args:
        path: Of the page.
        groups: As `summary.summarise` returns them, one at least.
    """
    cases = gather(groups)
    attacks, modes = (
        list(dict.fromkeys(names)) for names in zip(*((c.attack, c.label_mode) for c in cases), strict=True)
    )
    modes = [mode for mode in modes if mode]
    content = {
        'datasets': list(dict.fromkeys(case.dataset for case in cases)),
        'models': list(dict.fromkeys(case.model for case in cases)),
        'sentence': sentence(cases),
        'seeds': max(len(group.seeds) for group in groups),
        'columns': {name: COLUMNS[name] for name in measured(group.scores for group in groups)},
        'overall': overall(cases),
        'cases': [_shown(number, case, attacks, modes, cases) for number, case in enumerate(cases)],
        'attacks': [_attack(name) for name in attacks],
        'modes': modes,
        'empty': empty(cases, attacks, modes),
        'erased': f'{100 * ERASED:g}',
        'share': f'{100 * groups[0].case["clean_share"]:g}',
        'shares': len({group.case['clean_share'] for group in groups}),
    }
    write_text(path, template.render('table.html', content))


def gather(groups: Sequence[Group]) -> list[Case]:
    """Returns the cases, in the order of the groups; the first one's clean share is the usual one."""
    usual = groups[0].case['clean_share']
    benign_modes = {group.case['label_mode'] for group in groups if group.case['attack'] == 'none'}
    cases: dict[tuple[str, ...], Case] = {}
    for group in groups:
        found = group.case
        mode = '' if found['attack'] == 'none' and len(benign_modes) == 1 else found['label_mode']
        key = found['dataset'], found['model'], found['attack'], mode
        name = found['defense']
        if found['clean_share'] != usual:
            name += f' ({100 * found["clean_share"]:g} %)'
        cases.setdefault(key, Case(*key, {})).rows[name] = group
    return list(cases.values())


def best(rows: dict[str, dict[str, float]]) -> dict[str, set[str]]:
    """Returns which defenses are best at each score, of several; those that read the same share it.

    Args:
        rows: Shares by score, by defense; without the model that was not purified.
    """
    found: dict[str, set[str]] = {}
    for score, better in BEST.items():
        shown = {name: f'{100 * scores[score]:.1f}' for name, scores in rows.items() if score in scores}
        if len(shown) > 1:
            top = better(shown.values(), key=float)
            found[score] = {name for name, text in shown.items() if text == top}
    return found


def overall(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Returns a row a defense: its means over the cases with an attack, best among those that were in all of them."""
    attacked = [case for case in cases if case.attack != 'none']
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
        row['name']: row['means'] for row in rows if row['defense'] != FIRST and row['count'] == len(attacked)
    }
    marked = best(everywhere)
    return [row | {'best': {score for score, names in marked.items() if row['name'] in names}} for row in rows]


def sentence(cases: Sequence[Case]) -> str:
    """Returns what the defense that the verdict is about has done, on the mean over all cases with an attack."""
    rows = overall(cases)
    count = sum(case.attack != 'none' for case in cases)
    many = f'{count} case{"s" if count > 1 else ""}'
    defenses = [row['defense'] for row in rows if row['defense'] != FIRST]
    chosen = next((row for row in rows if defenses and row['defense'] == featured(defenses)), None)
    before: dict[str, float] = {}
    if chosen is not None:
        shared = overall([case for case in cases if chosen['name'] in case.rows])
        before = next((row['means'] for row in shared if row['defense'] == FIRST), {})
    if chosen is None or not {'acc', 'asr'} <= before.keys() & chosen['means'].keys():
        return f'{many} of an attack.' if count else 'Models without an attack.'
    after = chosen['means']
    over = f'over {many}' if chosen['count'] == count else f'over {chosen["count"]} of {many}'
    return (
        f'{chosen["name"].upper()} leaves {percent(after["asr"])} of triggered images obeying the attacker, on the '
        f'mean {over} ({percent(before["asr"])} before), at a clean accuracy of {percent(after["acc"])} '
        f'({percent(before["acc"])} before).'
    )


def empty(cases: Sequence[Case], attacks: Sequence[str], modes: Sequence[str]) -> list[tuple[int, int]]:
    """Returns the choices of an attack and a label mode, as indices, that no case answers to."""
    there = {(case.attack, case.label_mode) for case in cases}
    return [
        (i, j)
        for i, attack in enumerate(attacks)
        for j, mode in enumerate(modes)
        if (attack, mode) not in there and (attack, '') not in there
    ]


def measured(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Returns the columns that some row has something in."""
    found = set().union(*rows)
    return [name for name in COLUMNS if name in found]


def _shown(number: int, case: Case, attacks: list[str], modes: list[str], cases: Sequence[Case]) -> dict[str, Any]:
    """What the page holds of a case."""
    rows = {name: group.scores for name, group in case.rows.items()}
    first = {name for name, group in case.rows.items() if group.case['defense'] == FIRST}
    marked = best({n: {s: v.mean for s, v in scores.items()} for n, scores in rows.items() if n not in first})
    told = [_attack(case.attack), *([case.label_mode] if case.label_mode else [])]
    told += [getattr(case, field) for field in ('dataset', 'model') if len({getattr(c, field) for c in cases}) > 1]
    return {
        'title': ', '.join(told),
        'attack': attacks.index(case.attack),
        'mode': modes.index(case.label_mode) if case.label_mode else '',
        'rows': [
            {
                'name': name,
                'first': name in first,
                'seeds': len(case.rows[name].seeds),
                'cells': {
                    score: _cell(score, scores[score], name in marked.get(score, ())) if score in scores else None
                    for score in COLUMNS
                },
            }
            for name, scores in rows.items()
        ],
        'columns': measured(rows.values()),
        'panel': score_bars.case(f'case{number}', rows, first),
    }


def _cell(score: str, spread: Spread, is_best: bool) -> dict[str, Any]:
    scale, digits = (1, 0) if score == 'seconds' else (100, 1)
    deviation = '' if spread.deviation is None else f'{scale * spread.deviation:.{digits}f}'
    return {'mean': f'{scale * spread.mean:.{digits}f}', 'deviation': deviation, 'best': is_best}


def _attack(name: str) -> str:
    return 'benign' if name == 'none' else name


def main(arguments: list[str]) -> int:
    """Runs the command, and returns its exit status."""
    return cli.run(_command, __doc__, arguments)


def _command(arguments: list[str]) -> int:
    parser = cli.Parser(prog='aft_jax.report.table_page', add_help=False)
    parser.add_argument('table')
    parser.add_argument('--out', required=True)
    flags = parser.parse_args(arguments)
    if missing := requirements.missing('matplotlib', 'jinja2'):
        raise UserError(f"the page needs {missing}, not installed here: pip install 'aft_jax[report]'.")
    groups = aggregate.summarise(aggregate.read(user_path(flags.table, 'TABLE.csv')))
    out = user_path(flags.out, '--out')
    try:
        write_table_page(out, groups)
    except OSError as error:
        raise UserError(f'--out={out} cannot be written ({error.strerror}).') from None
    print(out)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
