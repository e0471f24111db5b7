"""The distribution of the ASR that defenses leave on random triggers: numbers, tables, figure, page, partial tables."""

import csv
import json

import numpy as np
import pytest
from experiment_results import results, scores
from page_reader import Reader

from aft_jax import sweep
from aft_jax.attacks import random_trigger
from aft_jax.config import default_config, resolve
from aft_jax.pipeline import grid
from aft_jax.report import distribution_figure, distribution_section, table_page
from aft_jax.results import aggregate, distribution, table_rows, trigger_rows
from aft_jax.results.drawn_trigger import DrawnTrigger

# ASR before any defense, ASR and ACC after AFT, and the trigger's family. The ACC before is 0.9.
LOCAL = [(0.8, 0.0, 0.9), (0.9, 0.6, 0.88), (1.0, 0.02, 0.89), (0.95, 0.1, 0.91), (1.0, 0.06, 0.87)]
MODELS = [*((*model, 'local') for model in LOCAL), (0.79, 0.7, 0.1, 'local'), (0.9, 0.5, 0.9, 'global')]
FAMILY = {draw: random_trigger.draw(draw, (28, 28, 1)).family for draw in range(40)}


def rows(models, defense='aft'):
    """Rows of models of one label mode. FT was not run on the first one, and keeps the whole ASR of the others."""
    table = []
    for draw, (before, after, acc, family) in enumerate(models):
        der = (max(0, before - after) - max(0, 0.9 - acc) + 1) / 2
        purified = {defense: scores(acc, after, der=der)}
        if draw:
            purified['ft'] = scores(0.9, before, der=0.5)
        found = results(scores(0.9, before), 'random', **purified)
        table += trigger_rows.rows(found, DrawnTrigger(draw, family, f'{family} trigger {draw}'), 0.05)
    return table


def chosen(distributions, defense, family):
    return next(d for d in distributions if (d.case['defense'], d.family) == (defense, family))


def test_summarise_equals_hand_computed_numbers():
    local = chosen(distribution.summarise(rows(MODELS)), 'aft', 'local')
    assert local.rates == (0.0, 0.02, 0.06, 0.1, 0.6) and local.not_counted == 1
    # DER: 0.8 - 0, 0.3 - 0.02, 0.98 - 0.01, 0.85 - 0 and 0.94 - 0.03, plus 1 and halved.
    ratings = [0.9, 0.64, 0.985, 0.925, 0.955]
    assert local.scores == pytest.approx(
        {
            'asr_median': 0.06,
            'asr_p90': 0.1 + 0.6 * 0.5,  # position 0.9 * 4 = 3.6 among the sorted values
            'asr_max': 0.6,
            'asr_above_5': 3 / 5,
            'asr_above_10': 1 / 5,  # 0.1 is not above
            'asr_above_50': 1 / 5,
            'acc_before_mean': 0.9,
            'acc_lost_mean': 0.05 / 5,  # 0, 0.02, 0.01, -0.01, 0.03
            'acc_lost_max': 0.03,
            'der_mean': np.mean(ratings),
            'der_deviation': np.std(ratings, ddof=1),
        }
    )


def test_summarise_groups_by_family_and_defense():
    summary = distribution.summarise(rows(MODELS))
    assert [(d.family, d.case['defense']) for d in summary] == [
        (family, defense) for family in ('all', 'local', 'global') for defense in ('none', 'aft', 'ft')
    ]
    assert [len(chosen(summary, defense, 'all').rates) for defense in ('none', 'aft', 'ft')] == [6, 6, 5]
    assert distribution.counts(summary) == (6, 1)
    infected, single = chosen(summary, 'none', 'all'), chosen(summary, 'aft', 'global')
    assert infected.scores['asr_median'] == pytest.approx(0.925)  # between 0.9 and 0.95
    assert not {'acc_lost_mean', 'der_mean'} & infected.scores.keys()
    assert single.scores['asr_above_50'] == 0 and 'der_deviation' not in single.scores
    two = rows(MODELS) + [row | {'model': 'other', 'clean_share': 0.01} for row in rows(MODELS[-1:])]
    assert {d.name for d in distribution.summarise(two) if d.case['model'] == 'other'} == {
        'none (1 %), other',
        'aft (1 %), other',
    }


def test_to_csv_and_to_markdown_leave_missing_numbers_empty():
    summary = distribution.summarise(rows([(0.5, 0.4, 0.9, 'geometric'), (0.9, 0.2, 0.896, 'local')]))
    table = list(csv.DictReader(distribution.to_csv(summary).splitlines()))
    assert tuple(table[0]) == distribution.COLUMNS
    by_row = {(line['family'], line['defense']): line for line in table}
    assert by_row['all', 'aft']['counted'] == by_row['all', 'aft']['not_counted'] == '1'
    assert by_row['all', 'aft']['acc_lost_mean'] == '0.004' and by_row['all', 'none']['acc_lost_mean'] == ''
    assert by_row['geometric', 'aft']['counted'] == '0' and by_row['geometric', 'aft']['asr_max'] == ''
    text = distribution.to_markdown(summary)
    assert '1 of 2 models count.' in text
    assert '| all | aft | 1 | 1 | 20.0 | 20.0 | 20.0 | 100.0 | 100.0 | 0.0 | 90.0 | 0.4 | 0.4 | 84.8 |' in text
    assert '| geometric | aft | 0 | 1 |  |' in text
    assert distribution.to_markdown([]) == ''


def test_draws_csv_has_a_line_for_each_run():
    table = list(csv.DictReader(trigger_rows.draws_csv(rows(MODELS)).splitlines()))
    assert [(line['draw'], line['trigger']) for line in table][:2] == [
        ('0', 'local trigger 0'),
        ('1', 'local trigger 1'),
    ]
    assert list(table[0])[-6:] == ['aft_acc', 'aft_asr', 'aft_ra', 'ft_acc', 'ft_asr', 'ft_ra']
    second = {'acc': '0.9', 'asr': '0.9', 'aft_acc': '0.88', 'aft_asr': '0.6', 'aft_ra': '0.4', 'ft_asr': '0.9'}
    assert table[1].items() >= second.items() and table[0]['ft_asr'] == '' and len(table) == len(MODELS)
    assert table[1]['poisoned_share'] == '0.05' and table[1]['label_mode'] == 'all2one'


def test_steps_counts_the_rates_above_each_place():
    places, shares = distribution_figure.steps([0.001, 0.02, 0.02, 0.7])
    assert places.tolist() == [0.005, 0.02, 0.05, 0.1, 0.5, 0.7, 1.0]
    assert shares.tolist() == [0.75, 0.25, 0.25, 0.25, 0.25, 0.0, 0.0]


def test_write_table_page_has_a_section_of_random_triggers(tmp_path):
    table = rows(MODELS)
    benign = list(table_rows.rows(results(scores(0.9), 'none', aft=scores(0.89))))
    summary, groups = distribution.summarise(table), aggregate.summarise(table + benign)
    assert '| random | all2one | aft | 7 |' in aggregate.to_markdown(groups)
    table_page.write_table_page(tmp_path / 'page.html', groups, summary)
    page = Reader((tmp_path / 'page.html').read_text())
    page.check_stands_by_itself()
    text = page.visible_text.replace('\xa0', ' ')
    # Of 0, 2, 6, 10, 50 and 60 %, four are above 5 %; ACC falls by 0.05 / 6.
    assert (
        'Under AFT, 66.7 % of 6 models with random triggers keep an ASR above 5 % (median 8.0 %, worst 60.0 %)' in text
    )
    assert (
        'falls by 0.8 points on average' in text
        and '6 of 7 models count' in text
        and '7 models with random triggers' in text
    )
    assert 'All families' in text and 'ft 6 models only' in text and '1 seed' not in text
    assert page.sections[:2] == ['random', 'cases']  # means over cases are left out
    # The page of the table alone has no such section.
    (tmp_path / 'table.csv').write_text(table_rows.to_csv(table + benign))
    assert table_page.main([str(tmp_path / 'table.csv'), '--out', str(tmp_path / 'alone.html')]) == 0
    assert Reader((tmp_path / 'alone.html').read_text()).sections[0] == 'overall'


def test_sections_and_figures_without_a_counted_model(tmp_path):
    weak = distribution.summarise(rows([(0.5, 0.4, 0.9, 'local')]))
    assert distribution_figure.draw(tmp_path, weak) is None and distribution_section.content([]) is None
    assert distribution_section.sentence(weak) == '0 of 1 models with random triggers count.'
    table_page.write_table_page(tmp_path / 'page.html', aggregate.summarise(rows([(0.5, 0.4, 0.9, 'local')])), weak)
    assert '0 of 1 models count' in Reader((tmp_path / 'page.html').read_text()).visible_text


@pytest.fixture
def experiments(tmp_path):
    """Four experiments: random triggers 0, 1 and 2, and a benign control. The run of trigger 2 is not finished."""
    table = []
    for name, draw in (('draw0', 0), ('draw1', 1), ('draw2', 2), ('none', 0)):
        config = default_config()
        config.attack.name = 'none' if name == 'none' else 'random'
        config.attack.random.seed = draw
        config.attack.poisoned_share = 0.03
        table.append(grid.Experiment(name, config))
        if name == 'draw2':
            continue
        directory = grid.directory_of(tmp_path, table[-1])
        directory.mkdir(parents=True)
        (directory / 'config.json').write_text(json.dumps(resolve(config).to_dict()))
        attacked = name != 'none'
        outcome = results(
            scores(0.9, 0.95 if attacked else None),
            config.attack.name,
            aft=scores(0.89, 0.02 if attacked else None, der=0.96 if attacked else None),
        )
        if name == 'draw1':
            outcome.trigger = DrawnTrigger(1, 'geometric', 'geometric shift')
        (directory / 'results.json').write_text(json.dumps(outcome.to_json()))
    return table


def test_gather_writes_the_distribution_of_a_partial_table(tmp_path, experiments):
    drawn = random_trigger.draw(0, (16, 20, 3))
    arrays = {f'trigger_{name}': array for name, array in drawn.arrays.items()}
    np.savez(grid.directory_of(tmp_path, experiments[0]) / 'poison.npz', **arrays)
    sweep.gather(tmp_path, experiments)
    draws = list(csv.DictReader((tmp_path / 'draws.csv').read_text().splitlines()))
    # The first results.json is older than the field `trigger`.
    assert [(line['draw'], line['family'], line['trigger']) for line in draws] == [
        ('0', drawn.family, random_trigger.describe(drawn)),
        ('1', 'geometric', 'geometric shift'),
    ]
    assert draws[0]['poisoned_share'] == '0.03' and draws[0]['aft_asr'] == '0.02'
    lines = list(csv.DictReader((tmp_path / 'distribution.csv').read_text().splitlines()))
    assert lines[1]['defense'] == 'aft' and lines[1]['counted'] == '2' and lines[1]['asr_max'] == '0.02'
    assert (tmp_path / 'distribution.png').stat().st_size > 5000 and (tmp_path / 'distribution.svg').exists()
    assert '2 of 2 models count.' in (tmp_path / 'table.md').read_text()
    assert 'id="random"' in (tmp_path / 'index.html').read_text()


def test_gather_without_random_triggers_writes_no_distribution(tmp_path, experiments):
    sweep.gather(tmp_path, experiments[2:3])
    assert not (tmp_path / 'table.csv').exists()
    sweep.gather(tmp_path, experiments[2:])
    assert (tmp_path / 'table.csv').exists() and not list(tmp_path.glob('d*'))


@pytest.mark.parametrize('shape', [(16, 20, 3), (28, 28, 1)])
def test_of_manifest_describes_the_trigger_from_its_arrays(tmp_path, shape):
    config = default_config()
    config.attack.name = 'random'
    for draw, family in FAMILY.items():
        config.attack.random.seed = draw
        expected = DrawnTrigger.of(config, shape)
        assert expected is not None and expected.family == family
        arrays = random_trigger.draw(draw, shape).arrays
        np.savez(tmp_path / 'poison.npz', **{f'trigger_{name}': array for name, array in arrays.items()})
        assert DrawnTrigger.of_manifest(draw, tmp_path / 'poison.npz') == expected
    assert DrawnTrigger.of_manifest(5, tmp_path / 'none.npz') == DrawnTrigger(5, FAMILY[5], '')
    config.attack.name = 'sig'
    assert DrawnTrigger.of(config, shape) is None
