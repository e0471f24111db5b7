"""The page of a table: it is self-contained, marks the best scores, and shows every number of its CSV file."""

import html
import re

import numpy as np
import pytest
from page_reader import Reader

from aft_jax.cli import EXIT_USER_ERROR
from aft_jax.report import table_cases, table_page
from aft_jax.results import aggregate, table_rows

DEFENSES = ('none', 'ft', 'pbe', 'aft')
CASES = (('none', 'all2one'), ('blend', 'all2one'), ('blend', 'all2all'), ('<sig>', 'all2one'))
SCORES = ('acc', 'asr', 'ra', 'der')


@pytest.fixture(scope='module')
def rows():
    """Rows of runs with two seeds. PBE has no clean images, and it lacks one run and a whole case."""
    generator = np.random.default_rng(7)
    table = []
    for seed in (0, 1):
        for attack, mode in CASES:
            for defense in DEFENSES:
                if defense == 'pbe' and (attack == '<sig>' or (mode, seed) == ('all2all', 1)):
                    continue
                row = {'dataset': 'tiny', 'model': 'net', 'attack': attack, 'label_mode': mode, 'defense': defense}
                row |= {'seed': seed, 'clean_share': 0.0 if defense == 'pbe' else 0.05, 'seconds': 60.0}
                scores = dict(zip(SCORES, generator.uniform(0.2, 0.9, 4).round(6).tolist(), strict=True))
                if attack == 'none':
                    scores |= dict.fromkeys(('asr', 'ra', 'der'))
                if defense == 'none':
                    scores['der'] = None
                table.append(row | scores)
    return table


@pytest.fixture(scope='module')
def text(rows, tmp_path_factory):
    directory = tmp_path_factory.mktemp('table')
    (directory / 'table.csv').write_text(table_rows.to_csv(rows))
    assert table_page.main([str(directory / 'table.csv'), '--out', str(directory / 'page.html')]) == 0
    return (directory / 'page.html').read_text()


def tables(text):
    """The cells of every table of a page by its label, as {row: {column: text}}."""
    cells = {}
    for label, table in re.findall(r'aria-label="([^"]*)">\s*<table(.*?)</table>', text, re.DOTALL):
        heading, *body = (
            [
                ' '.join(html.unescape(re.sub(r'<[^>]*>', ' ', cell)).split())
                for cell in re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', line, re.DOTALL)
            ]
            for line in re.findall(r'<tr.*?</tr>', table, re.DOTALL)
        )
        cells[html.unescape(label)] = {row[0]: dict(zip(heading[1:], row[1:], strict=True)) for row in body}
    return cells


def of(rows, score, **fields):
    """The values of a score in the rows that have these fields."""
    chosen = (row for row in rows if all(row[name] == value for name, value in fields.items()))
    return np.array([row[score] for row in chosen if row[score] is not None])


def test_write_table_page_is_self_contained(text):
    read = Reader(text)
    read.check_stands_by_itself()
    assert len(read.all('svg')) == len(CASES) == len(read.all('article'))
    assert 'Means over the cases below' in read.visible_text and '<sig>, all2one' in read.visible_text
    assert 'aft 2' not in read.visible_text  # the number of seeds is shown only where some are missing


def test_write_table_page_fills_and_marks_every_cell(rows, text):
    cells = tables(text)
    names = {'pbe': 'pbe (0 %)'}
    marks = 0
    for attack, mode in CASES:
        case = {'attack': attack, 'label_mode': mode}
        shown = cells['Scores: ' + ('benign' if attack == 'none' else f'{attack}, {mode}')]
        for score in SCORES if attack != 'none' else ['acc']:
            means = {d: values.mean() for d in DEFENSES if len(values := of(rows, score, defense=d, **case))}
            competing = {d: mean for d, mean in means.items() if d != 'none'}
            winner = (min if score == 'asr' else max)(competing, key=competing.get)
            for defense, mean in means.items():
                values = of(rows, score, defense=defense, **case)
                expected = f'{100 * mean:.1f}' + (f' ± {100 * values.std(ddof=1):.1f}' if len(values) > 1 else '')
                name = names.get(defense, defense) + (' 1 seed only' if len(values) == 1 else '')
                assert shown[name][score.upper()] == ('★ best: ' if defense == winner else '') + expected
            marks += 1
    assert marks == 13 and text.count('class="unseen"') == 13 + 4
    assert shown['none']['DER'] == '–' and 'DER' not in cells['Scores: benign']['ft']


def test_overall_computes_means_over_all_cases(rows, text):
    attacked = [row for row in rows if row['attack'] != 'none']
    shown = tables(text)['Means over all cases']
    rates = {
        d: [of(attacked, 'asr', defense=d, attack=a, label_mode=m).mean() for a, m in CASES[1:]] for d in ('ft', 'aft')
    }
    winner = min(rates, key=lambda defense: np.mean(rates[defense]))
    for defense, values in rates.items():
        mark = '★ best: ' if defense == winner else ''
        assert shown[defense]['ASR'] == f'{mark}{100 * np.mean(values):.1f}'
        assert shown[defense]['worst ASR'] == f'{100 * max(values):.1f}'
        assert shown[defense]['ASR ≤ 5 %'] == '0 of 3'
    # Run in two cases of three: its means do not compete.
    assert shown['pbe (0 %)']['ASR ≤ 5 %'] == '0 of 2'
    assert not any('best' in cell for name in ('none', 'pbe (0 %)') for cell in shown[name].values())
    visible = Reader(text).visible_text.replace('\xa0', ' ')
    share = f'{100 * np.mean(rates["aft"]):.1f} %'
    assert f'Under AFT, {share} of triggered images are classified as the target label' in visible
    assert 'on average over 3 cases' in visible


def test_best_is_shared_by_equal_printed_values():
    rows = {'ft': {'acc': 0.90041, 'asr': 0.0}, 'aft': {'acc': 0.90039, 'asr': 0.02}, 'anp': {'acc': 0.9}}
    assert table_cases.best(rows) == {'acc': {'ft', 'aft', 'anp'}, 'asr': {'ft'}}
    assert table_cases.best({'aft': {'acc': 0.9}}) == {}


def test_read_returns_what_to_csv_wrote(rows, tmp_path):
    (tmp_path / 'table.csv').write_text(table_rows.to_csv(rows))
    assert aggregate.read(tmp_path / 'table.csv') == [{name: row[name] for name in table_rows.COLUMNS} for row in rows]


@pytest.mark.parametrize(
    'old, new, message',
    [
        ('defense,', 'defence,', 'lacks the columns defense'),
        (',60.0\n', ',soon\n', "row 2: seconds is 'soon', not a number"),
        (',60.0\n', ',nan\n', 'row 2: seconds is nan, which is out of range'),
        (',none,0,0.05,', ',none,0,5,', 'clean_share is 5, which is out of range'),
        (',none,0,0.05,', ',none,,0.05,', "seed is '', not a number"),
        (',60.0\n', ',60.0,1\n', 'number of fields differs'),
        (',none,1,', ',none,0,', 'an earlier row has the same run'),
        (None, 'dataset\n', 'lacks the columns model'),
        (None, '\x80', 'cannot be read as a table'),
    ],
)
def test_read_refuses_a_damaged_table(rows, tmp_path, capsys, old, new, message):
    good = table_rows.to_csv(rows)
    content = good.replace(old, new, 1) if old else new
    assert content != good
    (tmp_path / 'table.csv').write_bytes(content.encode('latin-1'))
    assert table_page.main([str(tmp_path / 'table.csv'), '--out', str(tmp_path / 'page.html')]) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1 and not (tmp_path / 'page.html').exists()


def test_main_reports_mistakes(tmp_path, capsys, monkeypatch):
    (tmp_path / 'empty.csv').write_text(','.join(table_rows.COLUMNS) + '\n')
    for arguments, message in (
        (['table.csv'], '--out'),
        (['table.csv', '--out', 'x', '--dark'], '--dark'),
        ([f'{tmp_path}/none.csv', '--out', 'x'], 'No such file'),
        ([f'{tmp_path}/empty.csv', '--out', 'x'], 'holds no run'),
    ):
        assert table_page.main(arguments) == EXIT_USER_ERROR
        assert message in capsys.readouterr().err
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    assert table_page.main(['table.csv', '--out', 'x']) == EXIT_USER_ERROR
    assert 'needs Matplotlib and Jinja2' in capsys.readouterr().err
