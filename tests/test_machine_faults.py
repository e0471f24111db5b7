"""Faults of machines and surroundings: each gives one sentence, or changes nothing. No number differs silently."""

import errno
import json
import logging
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from command import ROOT, run_here

from aft_jax import cli, errors, experiment, files, output, randomness
from aft_jax.config import default_config, resolve
from aft_jax.errors import UserError
from aft_jax.results import __main__ as results_command
from aft_jax.results import lock, record, workdir
from aft_jax.runtime import numerics, sharding
from aft_jax.sweep import open_root
from aft_jax.training.checkpoint import Checkpoints
from aft_jax.training.metrics import MetricWriter

CONFIG = f'--config={ROOT}/configs/quickstart.py'
FULL = OSError(errno.ENOSPC, 'No space left on device')


@pytest.fixture
def jax_setting():
    """A function that changes a setting of JAX until the end of the test."""
    before = {}

    def change(name, value):
        before.setdefault(name, jax.config.values[name])
        jax.config.update(name, value)

    yield change
    for name, value in before.items():
        jax.config.update(name, value)


# Numbers


@pytest.mark.parametrize('name, other', [('jax_default_prng_impl', 'rbg'), ('jax_threefry_partitionable', False)])
def test_pin_restores_the_random_numbers(name, other, jax_setting, caplog):
    expected = jax.random.normal(randomness.key_for(3, 'here'), (5,))
    jax_setting(name, other)
    assert jax.random.key_impl(randomness.key_for(3, 'here')) == jax.random.key_impl(
        jax.random.key(0, impl='threefry2x32')
    )
    numerics.pin()
    np.testing.assert_array_equal(jax.random.normal(randomness.key_for(3, 'here'), (5,)), expected)
    assert f'{name.upper()}={other} is ignored' in caplog.text
    caplog.clear()
    numerics.pin()
    assert not caplog.text


def test_pin_turns_64_bits_off(jax_setting):
    jax_setting('jax_enable_x64', True)
    numerics.pin()
    assert jax.numpy.zeros(1, float).dtype == np.float32


@pytest.fixture
def config():
    return resolve(default_config())


def claim(directory, config, checksum=1):
    with workdir.claim(directory, config, checksum):
        pass


def test_claim_refuses_other_numbers(tmp_path, config, jax_setting, monkeypatch):
    claim(tmp_path / 'run', config)
    monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=2 --xla_dump_to=/tmp/dump')
    claim(tmp_path / 'run', config)  # neither changes a number
    jax_setting('jax_default_matmul_precision', 'bfloat16')
    with pytest.raises(UserError, match="JAX_DEFAULT_MATMUL_PRECISION='default', and here it is 'bfloat16'"):
        claim(tmp_path / 'run', config)
    claim(tmp_path / 'other', config)
    assert json.loads((tmp_path / 'other/config.json').read_text())['numerics']['matmul_precision'] == 'bfloat16'
    assert workdir.differences(tmp_path / 'other', config) == []


def test_claim_takes_a_directory_that_did_not_record_the_settings(tmp_path, config, monkeypatch):
    claim(tmp_path, config)
    path = tmp_path / 'config.json'
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != 'numerics'}))
    monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_enable_fast_math=true')
    with pytest.raises(UserError, match="XLA_FLAGS='', and here it is '--xla_cpu_enable_fast_math=true'"):
        claim(tmp_path, config)
    monkeypatch.delenv('XLA_FLAGS')
    claim(tmp_path, config)


@pytest.mark.parametrize(
    'error', [AssertionError(), RuntimeError("Unable to initialize backend 'cuda': no (set JAX_P")]
)
def test_make_mesh_explains_an_absent_platform(error, monkeypatch, jax_setting):
    def fail():
        raise error

    jax_setting('jax_platforms', 'cuda')
    monkeypatch.setattr(jax, 'devices', fail)
    with pytest.raises(UserError, match='JAX_PLATFORMS=cuda cannot be used here .*unset it'):
        sharding.make_mesh()


# Work directories


def test_claim_refuses_a_directory_in_use(tmp_path, config):
    with workdir.claim(tmp_path, config, 1):
        before = (tmp_path / 'config.json').stat().st_mtime_ns
        with pytest.raises(UserError, match=r'in use by another run \(process \d+ on .*\); wait'):
            claim(tmp_path, config)
        assert (tmp_path / 'config.json').stat().st_mtime_ns == before
        with workdir.claim(tmp_path, config, 1, writes=False):
            pass  # another process of the same job
    claim(tmp_path, config)


def test_lock_of_a_dead_process_is_taken_over(tmp_path):
    program = 'import os; from pathlib import Path; from aft_jax.results.lock import lock; held = lock(Path("."), "x")'
    subprocess.run([sys.executable, '-c', f'{program}; os._exit(9)'], cwd=tmp_path, env={'PYTHONPATH': str(ROOT)})
    assert 'process' in (tmp_path / lock.NAME).read_text()
    lock.lock(tmp_path, '--workdir').__exit__()


def test_lock_waits_for_another_machine_that_may_be_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, 'POLL_SECONDS', 0.01)
    monkeypatch.setattr(lock, 'OTHER_MACHINE_SECONDS', 0.05)
    held = lock.lock(tmp_path, '--workdir')
    (tmp_path / lock.NAME).write_text('process 7 on a-machine-that-was-taken-away')
    with pytest.raises(UserError, match=r'in use by another run \(process 7 on a-machine'):
        lock.lock(tmp_path, '--workdir')
    monkeypatch.setattr(lock, 'OTHER_MACHINE_SECONDS', 60)
    threading.Timer(0.05, held.__exit__).start()  # its lease ends
    with lock.lock(tmp_path, '--workdir'):
        pass


def test_open_root_locks_each_shard(tmp_path):
    root, refused = tmp_path / 'table', pytest.raises(UserError, match='in use')
    with open_root(root, '0/2'), open_root(root, '1/2'), refused, open_root(root, '1/2'):
        pass


def test_claim_takes_the_same_data_by_another_path(tmp_path, config):
    config.dataset = 'npz:/data/mine.npz'
    claim(tmp_path, config)
    config.dataset = 'npz:mine.npz'
    claim(tmp_path, config)
    with pytest.raises(UserError, match='has changed since'):
        claim(tmp_path, config, checksum=2)
    config.dataset = 'npz:other.npz'
    with pytest.raises(UserError, match='dataset is'):
        claim(tmp_path, config, checksum=2)


def test_claim_sets_misplaced_files_aside(tmp_path, config, caplog):
    claim(tmp_path, config)
    for name in ('results.json', 'metrics.jsonl', 'poison.npz'):
        (tmp_path / name).mkdir()
    for name in ('tensorboard', 'report', 'export'):
        (tmp_path / name).write_text('')
    claim(tmp_path, config)
    assert len(list(tmp_path.glob('*.damaged'))) == 6
    assert 'metrics.jsonl is damaged (it is a folder) and was renamed to metrics.jsonl.damaged' in caplog.text


GOOD = {
    **dict.fromkeys(('dataset', 'model', 'attack', 'label_mode', 'seed', 'clean_share'), 'x'),
    'infected': {'acc': 1.0},
    'purified': {'ft': {'acc': 1.0}},
    'environment': {},
}


@pytest.mark.parametrize(
    'content',
    [
        b'[]',
        b'null',
        b'\xff\xfe',
        b'{"schema": 1',
        GOOD | {'infected': 3},
        GOOD | {'infected': {'acc': 'high'}},
        GOOD | {'purified': []},
        GOOD | {'purified': {'ft': 0.5}},
        GOOD | {'purified': {'ft': {'acc': 1.0, 'per_class': 3}}},
        GOOD | {'connection': [1]},
        GOOD | {'environment': None},
    ],
    ids=str,
)
def test_read_or_set_aside_renames_a_damaged_file(content, tmp_path, caplog):
    path = tmp_path / 'results.json'
    assert record.read_or_set_aside(path, writes=True) is None and not caplog.text
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert record.read_or_set_aside(path, writes=False) is None and path.exists()
    assert record.read_or_set_aside(path, writes=True) is None
    assert (tmp_path / 'results.json.damaged').exists() and not path.exists() and 'is damaged' in caplog.text
    path.write_text(json.dumps(GOOD))
    assert record.read_or_set_aside(path, writes=True).purified['ft'].acc == 1.0


LINES = b'{"step": 1, "stage": "infect"}\n', b'{"step": 2, "stage": "infect"}\n'


@pytest.mark.parametrize('damage', [b'\xff\xfe\n', b'[]\n', b'{"step": "1", "stage": "infect"}\n', b'null\n'])
def test_metric_writer_keeps_the_whole_lines_of_a_damaged_file(damage, tmp_path, caplog):
    content = LINES[0] + damage + LINES[1]
    (tmp_path / 'metrics.jsonl').write_bytes(content)
    MetricWriter(tmp_path).close()
    assert (tmp_path / 'metrics.jsonl').read_bytes() == b''.join(LINES)
    assert (tmp_path / 'metrics.jsonl.damaged').read_bytes() == content
    assert '1 of its 3 lines cannot be read' in caplog.text


def test_metric_writer_drops_a_last_line_that_was_cut_short(tmp_path, caplog):
    (tmp_path / 'metrics.jsonl').write_bytes(b''.join(LINES) + b'{"step": 3, "sta')
    MetricWriter(tmp_path).close()
    assert (tmp_path / 'metrics.jsonl').read_bytes() == b''.join(LINES)
    assert not caplog.text and not list(tmp_path.glob('*.damaged'))


# Storage


def test_explained_reports_a_full_disk(tmp_path):
    (tmp_path / 'config.json').write_text('{}')
    sentence = 'No space left on device.*the same command continues'
    with pytest.raises(UserError, match=sentence), files.explained(tmp_path / 'config.json'):
        try:
            raise FULL
        except OSError as error:
            raise ValueError('Orbax hides the reason') from error
    with pytest.raises(UserError, match='No space left'), files.explained(tmp_path / 'config.json'):
        raise ValueError('RESOURCE_EXHAUSTED: Error writing: No space left on device')  # as TensorStore has it
    with pytest.raises(ValueError, match='of ours'), files.explained(tmp_path / 'config.json'):
        raise ValueError('a mistake of ours')
    with pytest.raises(errors.Preempted), files.explained(tmp_path / 'config.json'):
        raise errors.Preempted


def test_metric_writer_reports_a_directory_that_was_removed(tmp_path):
    directory = tmp_path / 'run'
    directory.mkdir()
    (directory / 'config.json').write_text('{}')
    writer = MetricWriter(directory)
    writer.write('infect', 1, {'loss': 1.0})
    shutil.rmtree(directory)
    directory.mkdir()  # Orbax makes it again
    with pytest.raises(UserError, match='was removed during the run'), files.explained(directory / 'config.json'):
        writer.write('infect', 2, {'loss': 1.0})
    writer.close()


@pytest.mark.parametrize('blocked', ['checkpoints', 'checkpoints/infect'])
def test_checkpoints_reports_a_file_in_its_place(blocked, tmp_path):
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text('')
    with pytest.raises(UserError, match='infect cannot be written'):
        Checkpoints(tmp_path / 'checkpoints' / 'infect', keep=2)


# The terminal


class Broken:
    """A stream that cannot be written, as a full disk or a pipe whose reader has left."""

    encoding = 'ascii'

    def __init__(self, error):
        self.raised, self.texts = error, []

    def fileno(self):
        raise OSError

    def write(self, text):
        if self.raised:
            raise self.raised
        self.texts.append(text)

    def flush(self):
        pass


@pytest.mark.parametrize('error', [FULL, BrokenPipeError(errno.EPIPE, 'Broken pipe')])
def test_run_survives_output_that_cannot_be_written(error, monkeypatch):
    def command(arguments):
        for _ in range(2):
            print('a line', flush=True)
            print('a line', file=sys.stderr, flush=True)
        return 0

    monkeypatch.setattr(sys, 'stdout', Broken(error))
    monkeypatch.setattr(sys, 'stderr', Broken(error))
    assert cli.run(command, 'help', ['x']) == 0
    assert isinstance(sys.stdout, Broken)


@pytest.mark.parametrize('error, status', [(FULL, 2), (BrokenPipeError(errno.EPIPE, 'Broken pipe'), 0)])
def test_results_reports_a_table_that_is_lost(error, status, tmp_path, monkeypatch, capsys):
    (tmp_path / 'results.json').write_text(json.dumps(GOOD))
    monkeypatch.setattr(sys, 'stdout', Broken(error))
    assert results_command.main([str(tmp_path)]) == status
    assert ('the table cannot be written' in capsys.readouterr().err) == (status == 2)


def test_output_escapes_what_its_encoding_lacks():
    stream = Broken(None)
    output.Output(stream).write('97.1 – \u00e9')
    assert stream.texts == ['97.1 \\u2013 \\xe9']
    assert output.Output(None).write('dropped') == 7 and not output.Output(None).isatty()


def test_user_path_explains_a_locale_without_its_characters():
    with pytest.raises(UserError, match='--workdir=.*start with LC_ALL=C.UTF-8'):
        errors.user_path(b'/tmp/\xc3\xa9'.decode('ascii', 'surrogateescape'), '--workdir')


# The command line


@pytest.mark.parametrize(
    'fields',
    [
        ['--config.stages=("infect",)', '--config.stages=("purify",)'],
        ['--config.stages', '("infect",)', '--config.stages', '("purify",)'],
        ['--config.stages=("infect",)', '--config.seed=1', '-config.stages', '("purify",)', '--config.seed=2'],
    ],
)
def test_parse_takes_the_last_value_of_a_field(fields, tmp_path, capsys):
    status, text = run_here([CONFIG, f'--workdir={tmp_path}/run', *fields], capsys)
    assert status == 2 and "stages must contain 'infect'" in text


def test_parse_finds_the_neighbours_of_a_config_file_from_any_directory(tmp_path, monkeypatch, capsys):
    package = tmp_path / 'project' / 'neighbours_of_a_config'
    package.mkdir(parents=True)
    for name, text in {
        '__init__': '',
        'other': 'SEED = -5',
        'mine': 'from neighbours_of_a_config import other\n'
        'from aft_jax.config import default_config\n'
        'def get_config():\n    c = default_config()\n    c.seed = other.SEED\n    return c\n',
    }.items():
        (package / f'{name}.py').write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    for path in (package / 'mine.py', Path('project') / package.name / 'mine.py'):
        status, text = run_here([f'--config={path}', f'--workdir={tmp_path}/run'], capsys)
        assert status == 2 and 'seed=-5 must lie between' in text


def test_run_lets_warnings_pass_that_are_made_errors(monkeypatch):
    import warnings

    def command(arguments):
        warnings.warn('of a library', stacklevel=1)
        return 0

    monkeypatch.setattr(sys, 'warnoptions', ['error'])
    with warnings.catch_warnings(record=True):
        warnings.simplefilter('error')
        assert cli.run(command, 'help', ['x']) == 0


def test_run_experiment_reports_a_full_disk(tmp_path, config, monkeypatch, caplog):
    """The frame of a whole run: whatever raises the error, the sentence names the work directory."""
    caplog.set_level(logging.ERROR)
    claimed = tmp_path / 'run'
    config.dataset = 'mnist5k'

    class Loaded:
        config, given = config, None

        class scenario:
            module = None

            class dataset:
                arrays = (np.zeros(1),)

    def fail(*_):
        raise FULL

    monkeypatch.setattr(experiment, 'load', lambda *_: Loaded)
    monkeypatch.setattr(experiment, 'compiler_options', fail)
    with pytest.raises(UserError, match=f'{claimed} can no longer be written .No space left on device'):
        experiment.run_experiment(default_config(), claimed)
    claim(claimed, config, json.loads((claimed / 'config.json').read_text())['data_checksum'])  # the lock is free
