"""The rows of tables of several runs."""

import csv
import io
import json

import pytest

from aft_jax.errors import UserError
from aft_jax.results import __main__ as command
from aft_jax.results import table_rows

RESULTS = {
    'schema': 1,
    'dataset': 'mnist5k',
    'model': 'mnist_cnn',
    'attack': 'blend',
    'label_mode': 'all2one',
    'seed': 3,
    'clean_share': 0.05,
    'infected': {'acc': 0.97, 'asr': 1.0, 'ra': 0.0, 'cross_acc': None, 'seconds': 9.5, 'per_class': {}},
    'purified': {'aft': {'acc': 0.96, 'asr': 0.01, 'ra': 0.95, 'der': 0.99, 'seconds': 4.25, 'per_class': {}}},
    'environment': {},
}


def test_read_returns_a_row_for_each_run_and_defense(tmp_path, capsys):
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'results.json').write_text(json.dumps(RESULTS | {'attack': name}))
    assert command.main([str(tmp_path / 'a'), str(tmp_path / 'b')]) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row['attack'], row['defense']) for row in table] == [
        ('a', 'none'),
        ('a', 'aft'),
        ('b', 'none'),
        ('b', 'aft'),
    ]
    assert table[1] == {
        'dataset': 'mnist5k',
        'model': 'mnist_cnn',
        'attack': 'a',
        'label_mode': 'all2one',
        'defense': 'aft',
        'seed': '3',
        'clean_share': '0.05',
        'acc': '0.96',
        'asr': '0.01',
        'ra': '0.95',
        'der': '0.99',
        'seconds': '4.25',
    }
    assert table[0]['der'] == ''


def test_detection_rows_has_a_row_for_each_round(tmp_path):
    pbe = {'acc': 0.9, 'poisoned_shares': [0.1, 0.02], 'aucs': [0.7, None]}
    results = RESULTS | {'purified': RESULTS['purified'] | {'pbe': pbe}}
    (tmp_path / 'results.json').write_text(json.dumps(results))
    content = table_rows.to_csv(table_rows.detection_rows(table_rows.read([tmp_path])), table_rows.DETECTION_COLUMNS)
    assert content.splitlines() == [
        'dataset,model,attack,label_mode,defense,seed,round,poisoned_share,auc',
        'mnist5k,mnist_cnn,blend,all2one,pbe,3,1,0.1,0.7',
        'mnist5k,mnist_cnn,blend,all2one,pbe,3,2,0.02,',
    ]


@pytest.mark.parametrize('content', [None, '{"attack"', '{}', '[]'])
def test_read_refuses_a_run_without_results(tmp_path, content):
    if content is not None:
        (tmp_path / 'results.json').write_text(content)
    with pytest.raises(UserError, match='not finished' if content is None else 'damaged'):
        table_rows.read([tmp_path])
