"""Writes a table of many runs as one self-contained page: WORKDIR/index.html of a sweep.

    python -m aft_jax.report.table_page docs/results/fashion_mnist/table.csv --out page.html

    TABLE.csv   a table that a sweep or `python -m aft_jax.results` wrote
    --out       the page

Needs Matplotlib and Jinja2: pip install 'aft_jax[report]'.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from aft_jax import cli
from aft_jax.config import BENIGN, UNPURIFIED
from aft_jax.errors import UserError, user_path
from aft_jax.files import write_text
from aft_jax.report import distribution_section, requirements, score_bars, template
from aft_jax.report.table_cases import Case, best, empty, gather, overall, sentence
from aft_jax.report.verdict import ERASED
from aft_jax.results import aggregate
from aft_jax.results.aggregate import Group, Spread
from aft_jax.results.distribution import Distribution

COLUMNS = {'acc': 'ACC', 'asr': 'ASR', 'ra': 'RA', 'der': 'DER', 'seconds': 'seconds'}


def write_table_page(path: Path, groups: Sequence[Group], distributions: Sequence[Distribution] = ()) -> None:
    """Writes the page.

    Args:
        path: Path of the page.
        groups: Groups of runs, as `aggregate.summarise` returns them; at least one.
        distributions: Distributions over random triggers, as `distribution.summarise` returns them.
    """
    cases = gather(groups)
    attacks, modes = (
        list(dict.fromkeys(names)) for names in zip(*((c.attack, c.label_mode) for c in cases), strict=True)
    )
    modes = [mode for mode in modes if mode]
    # Means over cases say little about random triggers. Their section takes the place of these.
    only_random = bool(distributions) and all(group.random for group in groups if group.case['attack'] != BENIGN)
    noun = 'model' if any(group.random for group in groups) else 'seed'
    content = {
        'datasets': list(dict.fromkeys(case.dataset for case in cases)),
        'models': list(dict.fromkeys(case.model for case in cases)),
        'sentence': distribution_section.sentence(distributions) if only_random else sentence(cases),
        'seeds': max(len(group.seeds) for group in groups),
        'noun': noun,
        'random': distribution_section.content(distributions),
        'columns': {name: COLUMNS[name] for name in measured(group.scores for group in groups)},
        'overall': [] if only_random else overall(cases),
        'cases': [_shown(number, case, attacks, modes, cases) for number, case in enumerate(cases)],
        'attacks': [_attack(name) for name in attacks],
        'modes': modes,
        'empty': empty(cases, attacks, modes),
        'erased': f'{100 * ERASED:g}',
        'share': f'{100 * groups[0].case["clean_share"]:g}',
        'shares': len({group.case['clean_share'] for group in groups}),
    }
    write_text(path, template.render('table.html', content))


def measured(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Lists the columns that have a value in at least one row."""
    present = set().union(*rows)
    return [name for name in COLUMNS if name in present]


def _shown(number: int, case: Case, attacks: list[str], modes: list[str], cases: Sequence[Case]) -> dict[str, Any]:
    """Collects the content of one case for the page."""
    rows = {name: group.scores for name, group in case.rows.items()}
    first = {name for name, group in case.rows.items() if group.case['defense'] == UNPURIFIED}
    marked = best({n: {s: v.mean for s, v in scores.items()} for n, scores in rows.items() if n not in first})
    title = [_attack(case.attack), *([case.label_mode] if case.label_mode else [])]
    title += [getattr(case, field) for field in ('dataset', 'model') if len({getattr(c, field) for c in cases}) > 1]
    return {
        'title': ', '.join(title),
        'attack': attacks.index(case.attack),
        'mode': modes.index(case.label_mode) if case.label_mode else '',
        'rows': [
            {
                'name': name,
                'first': name in first,
                'only': _only(case.rows[name], case, cases),
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


def _only(group: Group, case: Case, cases: Sequence[Case]) -> str:
    """Formats the number of runs of a row if others have more, such as '1 seed only'; otherwise ''.

    Cases with random triggers have different numbers of runs, so that rows are compared within a case.
    """
    groups = [row for c in cases for row in c.rows.values()]
    random = any(row.random for row in groups)
    count, most = len(group.seeds), max(len(row.seeds) for row in (case.rows.values() if random else groups))
    return f'{count} {"model" if random else "seed"}{"s" if count > 1 else ""} only' if count < most else ''


def _cell(score: str, spread: Spread, is_best: bool) -> dict[str, Any]:
    scale, digits = (1, 0) if score == 'seconds' else (100, 1)
    deviation = '' if spread.deviation is None else f'{scale * spread.deviation:.{digits}f}'
    return {'mean': f'{scale * spread.mean:.{digits}f}', 'deviation': deviation, 'best': is_best}


def _attack(name: str) -> str:
    return 'benign' if name == BENIGN else name


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
