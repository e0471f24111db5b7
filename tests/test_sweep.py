"""A table of experiments: its expansion and shards, and that a sweep is interrupted, resumed and summed up."""

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest
from command import ROOT
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from page_reader import Reader

from aft_jax import cli, config, sweep
from aft_jax.config import default_config
from aft_jax.errors import Preempted, UserError
from aft_jax.pipeline import grid
from aft_jax.results import aggregate

CACHE = ROOT / '.jax_cache' / 'sweep'
TABLE = """
from aft_jax.config import default_config, table_config

def get_config():
    experiments = {{}}
    for attack in ('badnets', 'blend'):
        config = experiments[attack] = default_config()
        config.attack.name = attack
        config.dataset = 'npz:{npz}'
        config.batch_size = 16
        config.clean_share = 0.2
        config.train.epochs = 2
        config.ft.epochs = 1
        config.ft.learning_rates = (0.01,)
        config.run.checkpoint_every = 10
        config.run.log_every = 10
        config.run.purify_points = 2
        config.run.compile_cache = '{cache}'
    return table_config(experiments, label_modes='all2one', seeds=(0, 1), stages=('infect', 'purify'), defenses='ft')
"""


@pytest.fixture(scope='module')
def table(tmp_path_factory) -> Path:
    """A 2 x 2 grid: two attacks, two seeds."""
    folder = tmp_path_factory.mktemp('table')
    generator = np.random.default_rng(5)
    labels = np.arange(288) % 4
    images = generator.integers(0, 200, (288, 12, 12, 1)) + 14 * labels[:, None, None, None]
    np.savez(
        folder / 'data.npz',
        train_images=images[:224].astype(np.uint8),
        train_labels=labels[:224],
        test_images=images[224:].astype(np.uint8),
        test_labels=labels[224:],
    )
    path = folder / 'table.py'
    path.write_text(TABLE.format(npz=folder / 'data.npz', cache=CACHE))
    return path


@pytest.fixture(scope='module', autouse=True)
def compile_cache():
    """Restores the setting that a table changes for the whole process."""
    before = jax.config.values['jax_compilation_cache_dir']
    yield
    jax.config.update('jax_compilation_cache_dir', before)
    reset_cache()


class Swept(NamedTuple):
    """A sweep that was killed in its second run and then finished by the same command.

    Attributes:
        arguments: Arguments of the command.
        root: Work directory of the table.
        first: Text of the first run's results.json, and its time of change, after the kill.
        output: Standard output of the second command.
    """

    arguments: list[str]
    root: Path
    first: tuple[str, int]
    output: str


@pytest.fixture(scope='module')
def swept(table, tmp_path_factory) -> Swept:
    root = tmp_path_factory.mktemp('swept') / 'sweep'
    arguments = [f'--config={table}', f'--workdir={root}']
    process = start_sweep(arguments)
    deadline = time.monotonic() + 240
    while not (root / 'runs/blend-all2one-0/metrics.jsonl').exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = root / 'runs/badnets-all2one-0/results.json'
    results_and_time = first.read_text(), first.stat().st_mtime_ns
    assert not (root / 'runs/blend-all2one-1/results.json').exists()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert sweep_here(arguments) == 0
    return Swept(arguments, root, results_and_time, output.getvalue())


def sweep_here(arguments: list[str]) -> int:
    """Runs the command in this process."""
    sweep.FLAGS.unparse_flags()
    for name in list(sweep.FLAGS):
        if name.startswith('config.'):
            delattr(sweep.FLAGS, name)
    for name, default in (('config', None), ('workdir', None), ('shard', '0/1')):
        sweep.FLAGS[name].value = default
    # ml_collections reads overrides from sys.argv, whatever it was given to parse.
    with mock.patch.object(sys, 'argv', ['aft_jax', *arguments]):
        return sweep.main(sys.argv)


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def start_sweep(arguments: list[str]) -> subprocess.Popen:
    """Starts the command in a process of its own with one CPU device."""
    command = [sys.executable, '-m', 'aft_jax.sweep', *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {'JAX_PLATFORMS': 'cpu'}, stdout=subprocess.DEVNULL)


def test_sweep_resumes_after_a_kill(swept):
    root, first = swept.root, swept.root / 'runs/badnets-all2one-0/results.json'
    assert 'badnets-all2one-0: finished earlier' in swept.output
    assert (first.read_text(), first.stat().st_mtime_ns) == swept.first
    rows = read(root / 'table.csv')
    assert [(row['attack'], row['seed'], row['defense']) for row in rows] == [
        (attack, seed, defense) for seed in '01' for attack in ('badnets', 'blend') for defense in ('none', 'ft')
    ]
    assert [row['attack'] for row in read(root / 'infected.csv')] == ['badnets', 'blend'] * 2
    accuracies = [float(row['acc']) for row in rows if row['attack'] == 'blend' and row['defense'] == 'ft']
    mean, deviation = statistics.fmean(accuracies), statistics.stdev(accuracies)
    line = next(x for x in (root / 'table.md').read_text().splitlines() if x.startswith('| blend | all2one | ft |'))
    assert line.startswith(f'| blend | all2one | ft | 2 | {100 * mean:.2f} ± {100 * deviation:.2f} |')
    assert (root / 'table.png').stat().st_size > 5000 and (root / 'table.svg').exists()
    page = Reader((root / 'index.html').read_text())
    page.check_stands_by_itself()
    assert (
        'Under FT,' in page.visible_text
        and 'badnets, all2one' in page.visible_text
        and 'blend, all2one' in page.visible_text
    )
    assert any(CACHE.iterdir())


def test_sweep_evaluates_while_purifying(swept):
    """The evaluations at the beginning and the end of a defense are the scores of results.json."""
    for path in sorted((swept.root / 'runs').iterdir()):
        lines = [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
        evaluated = [line for line in lines if line['stage'] == 'purify/ft' and 'test_acc' in line]
        results = json.loads((path / 'results.json').read_text())
        assert [line['step'] for line in evaluated] == [0, 2, 3]
        for line, scores in ((evaluated[0], results['infected']), (evaluated[-1], results['purified']['ft'])):
            assert (line['test_acc'], line['test_asr']) == (scores['acc'], scores['asr'])


def test_gather_writes_a_table_of_detections(swept):
    """A defense that detects poisoned images has a table of its own. A finished sweep runs nothing again."""
    times = [path.stat().st_mtime_ns for path in sorted(swept.root.glob('runs/*/results.json'))]
    assert not (swept.root / 'detection.csv').exists()
    first = swept.root / 'runs/badnets-all2one-0/results.json'
    results = json.loads(swept.first[0])
    results['purified']['pbe'] = results['purified']['ft'] | {'poisoned_shares': [0.1, 0.0], 'aucs': [0.5, 1.0]}
    first.write_text(json.dumps(results))
    assert sweep_here(swept.arguments) == 0
    assert [(row['attack'], row['round'], row['auc']) for row in read(swept.root / 'detection.csv')] == [
        ('badnets', '1', '0.5'),
        ('badnets', '2', '1.0'),
    ]
    first.write_text(swept.first[0])
    assert [path.stat().st_mtime_ns for path in sorted(swept.root.glob('runs/*/results.json'))][1:] == times[1:]


def test_sweep_continues_after_a_failure(swept, table, tmp_path, capsys):
    root = tmp_path / 'sweep'
    (root / 'runs/badnets-all2one-0').mkdir(parents=True)
    (root / 'runs/badnets-all2one-0/config.json').write_text('{"seed": 7}')
    # The results of another config do not belong to this table.
    (root / 'runs/badnets-all2one-0/results.json').write_text('{"infected": {}, "purified": {"ft": {}}}')
    # The run after the failure has its checkpoints already, and only measures.
    blend = 'runs/blend-all2one-0'
    shutil.copytree(swept.root / blend, root / blend, ignore=shutil.ignore_patterns('results.json'))
    arguments = [f'--config={table}', f'--workdir={root}', '--config.seeds=(0,)']
    assert sweep_here(arguments) == cli.EXIT_FAILURES
    assert 'badnets-all2one-0 failed: --workdir=' in capsys.readouterr().err
    assert [row['attack'] for row in read(root / 'table.csv')] == ['blend', 'blend']


def test_sweep_keeps_the_traceback_of_a_failure(table, tmp_path):
    with mock.patch('aft_jax.experiment.run_experiment', side_effect=RuntimeError('out of luck')):
        arguments = [f'--config={table}', f'--workdir={tmp_path}', '--config.seeds=(0,)']
        assert sweep_here(arguments) == cli.EXIT_FAILURES
    for attack in ('badnets', 'blend'):
        assert 'RuntimeError: out of luck' in (tmp_path / f'runs/{attack}-all2one-0/error.txt').read_text()


@pytest.mark.parametrize(
    'exception, status, sentence',
    [
        (Preempted, cli.EXIT_PREEMPTED, 'Stopped by SIGTERM. Everything is saved.'),
        (KeyboardInterrupt, cli.EXIT_INTERRUPTED, 'Interrupted.'),
    ],
)
def test_sweep_stops_as_a_whole(exception, status, sentence, table, tmp_path, capsys):
    with mock.patch('aft_jax.experiment.run_experiment', side_effect=exception) as run:
        assert sweep_here([f'--config={table}', f'--workdir={tmp_path / "sweep"}']) == status
    assert run.call_count == 1 and sentence in capsys.readouterr().err


def experiments(*names: str) -> dict:
    configs = {}
    for name in names:
        configs[name] = default_config()
        configs[name].attack.name = name
    return configs


def test_expand_orders_by_seed_and_runs_a_benign_control_once():
    table = config.table_config(experiments('sig', 'none'), seeds=(3, 4), defenses='ft')
    expanded = grid.expand(table)
    assert [e.name for e in expanded] == [
        *('sig-all2one-3', 'sig-all2all-3', 'none-3'),
        *('sig-all2one-4', 'sig-all2all-4', 'none-4'),
    ]
    assert [(e.config.seed, e.config.attack.label_mode, e.config.defenses) for e in expanded[:2]] == [
        (3, 'all2one', 'ft'),
        (3, 'all2all', 'ft'),
    ]
    assert table.experiments.sig.seed == 0  # the table itself is unchanged
    table.select = 'none'
    assert [e.name for e in grid.expand(table)] == ['none-3', 'none-4']


def test_share_splits_the_work():
    everything = [grid.Experiment(str(i), default_config()) for i in range(7)]
    parts = [grid.share(everything, f'{i}/3') for i in range(3)]
    assert sorted(e.name for part in parts for e in part) == [e.name for e in everything]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize('shard', ['2/2', '1', '-1/2', 'a/b', '0/0', ''])
def test_share_refuses_a_wrong_shard(shard):
    with pytest.raises(UserError, match='--shard='):
        grid.share([], shard)


@pytest.mark.parametrize(
    'field, value, match',
    [
        ('select', 'sgi', "Did you mean 'sig'"),
        ('seeds', (), 'no experiment'),
        ('label_modes', '', 'label_modes is empty'),
        ('label_modes', 'all2none', 'label_mode'),
        ('defenses', 'prayer', 'prayer'),
        ('stages', ('infect', 'hope'), 'hope'),
        ('seeds', (-1,), 'seed'),
        ('seeds', ('a',), 'must be whole numbers'),
    ],
)
def test_expand_refuses_a_wrong_table(field, value, match):
    table = config.table_config(experiments('sig'))
    table[field] = value
    with pytest.raises(UserError, match=match):
        grid.expand(table)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--config=nowhere.py', '--workdir=x'], 'does not exist'),
        (['--config=configs/quickstart.py', '--workdir=x'], 'table_config'),
        (['--config=configs/tables/fashion_mnist.py', '--workdir=x', '--shard=3/2'], '--shard=3/2'),
        (['--config=configs/tables/fashion_mnist.py'], '--workdir is missing'),
        (
            ['--config=configs/tables/random_triggers.py', '--workdir=x', '--config.run.checkpoint_every=5'],
            "no field 'run' in the config of a table; it has defenses, experiments, label_modes, seeds, select, ",
        ),
        # The fields of an experiment are those of its config, not of a table.
        (
            ['--config=configs/tables/random_triggers.py', '--workdir=x', '--config.experiments.none.runn=5'],
            'runn',
        ),
    ],
)
def test_main_explains_a_mistake_in_one_sentence(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert sweep_here(arguments) == cli.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def row(defense: str, seed: int, **scores) -> dict:
    shared = {'dataset': 'd', 'model': 'm', 'clean_share': 0.05, 'attack': 'sig', 'label_mode': 'all2one'}
    return shared | {'defense': defense, 'seed': seed} | scores


def test_summarise_equals_numpy():
    accuracies = [0.91, 0.92, 0.96]
    groups = aggregate.summarise([row('ft', seed, acc=acc, asr=None) for seed, acc in enumerate(accuracies)])
    assert [group.seeds for group in groups] == [(0, 1, 2)]
    assert groups[0].scores.keys() == {'acc'}
    assert groups[0].scores['acc'].mean == pytest.approx(np.mean(accuracies))
    assert groups[0].scores['acc'].deviation == pytest.approx(np.std(accuracies, ddof=1))


def test_summarise_separates_clean_shares():
    rows = [row('ft', 0, acc=0.5), row('aft', 0, acc=0.6), row('ft', 0, acc=0.7) | {'clean_share': 0.01}]
    groups = aggregate.summarise(rows)
    assert [group.scores['acc'].mean for group in groups] == [0.5, 0.6, 0.7]
    assert all(group.scores['acc'].deviation is None for group in groups)
    text = aggregate.to_markdown(groups)
    assert '| sig | all2one | ft | 0.01 | 1 | 70.00 |' in text and 'clean_share' in text.splitlines()[0]


def test_expand_accepts_the_tables_of_configs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from configs.tables import cifar10, fashion_mnist, preact_resnet

    for module, size in (cifar10, 3 * (2 * 5 + 1)), (fashion_mnist, 3 * (2 * 5 + 1)), (preact_resnet, 5 + 1):
        expanded = grid.expand(module.get_config())
        assert len(expanded) == size == len({e.name for e in expanded})
        assert json.dumps(expanded[0].config.to_dict())
