"""Whole experiments on a tiny data set: the files they write, other settings, and later starts."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from command import ROOT, run_here

from aft_jax.analysis import observe
from aft_jax.analysis.probe import ModelProbe
from aft_jax.report import trigger_gallery
from aft_jax.results.workdir import RunFiles

NO_REPORT = '--config.stages=("infect","purify")'


@pytest.fixture(autouse=True, scope='module')
def few_images():
    """Observes only 16 images at two sizes, with short attacks, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observe, 'IMAGES', 16)
        patch.setattr(observe, 'SWEPT_EPS', (4 / 255, observe.EPS))
        patch.setattr(observe, 'ModelProbe', partial(ModelProbe, steps=2))
        yield


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
    """A data set of 256 training and 64 test images in four classes; the bright quarter is the class."""
    generator = np.random.default_rng(3)
    labels = np.arange(320) % 4
    images = generator.integers(0, 120, (320, 12, 12, 1))
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[row * 6 : row * 6 + 6, column * 6 : column * 6 + 6] += 100
    images = images.astype(np.uint8)
    path = tmp_path_factory.mktemp('data') / 'tiny.npz'
    np.savez(
        path,
        train_images=images[:256],
        train_labels=labels[:256],
        test_images=images[256:],
        test_labels=labels[256:],
    )
    return path


def arguments_of(npz, workdir):
    return [
        f'--config={ROOT}/configs/mnist5k.py',
        f'--workdir={workdir}',
        f'--config.dataset=npz:{npz}',
        '--config.batch_size=16',
        '--config.clean_share=0.25',
        '--config.augment.crop=0',
        '--config.train.epochs=6',
        '--config.ft.epochs=2',
        '--config.aft.reference_steps=8',
        '--config.aft.steps=8',
        '--config.aft.pgd_steps=1',
        '--config.aft.universal=linf,rectangle',
        '--config.aft.per_image=linf',
    ]


def run(npz, workdir, capsys, *more):
    status, text = run_here([*arguments_of(npz, workdir), *more], capsys)
    assert status == 0, text
    return json.loads((workdir / 'results.json').read_text())


BADNETS = ('--config.attack.name=badnets', '--config.attack.target=2')


@pytest.fixture(scope='module')
def badnets_run(npz, tmp_path_factory):
    """The work directory of an experiment with all its stages."""
    workdir = tmp_path_factory.mktemp('runs') / 'badnets'
    silent = SimpleNamespace(readouterr=lambda: SimpleNamespace(err=''))
    assert run_here([*arguments_of(npz, workdir), *BADNETS], silent)[0] == 0
    return workdir


def test_run_experiment_writes_the_results(npz, badnets_run):
    results = json.loads((badnets_run / 'results.json').read_text())
    assert list(results)[:7] == ['schema', 'dataset', 'model', 'attack', 'label_mode', 'seed', 'clean_share']
    assert list(results.values())[:7] == [1, f'npz:{npz}', 'mnist_cnn', 'badnets', 'all2one', 0, 0.25]
    assert results['environment']['devices'] == 4 and results['environment']['processes'] == 1
    infected, aft = results['infected'], results['purified']['aft']
    assert infected['acc'] > 0.9 and infected['asr'] > 0.5
    assert infected['per_class']['asr'][2] is None  # the target class cannot be attacked
    assert np.isclose(infected['asr'], np.mean([x for x in infected['per_class']['asr'] if x is not None]))
    expected = (max(0, infected['asr'] - aft['asr']) - max(0, infected['acc'] - aft['acc']) + 1) / 2
    assert aft['der'] == pytest.approx(expected) and aft['seconds'] > 0
    assert 8 < results['connection']['images'] < 16 and results['connection']['purified'].keys() == {'ft', 'aft'}


def test_run_experiment_writes_its_files_where_run_files_names_them(badnets_run):
    run_files = RunFiles(badnets_run)
    stages = {json.loads(line)['stage'] for line in run_files.metrics.read_text().splitlines()}
    assert stages == {'infect', 'purify/ft', 'purify/aft/reference', 'purify/aft/adversarial'}
    assert all(run_files.checkpoints(stage).is_dir() for stage in stages)
    config = json.loads(run_files.config.read_text())
    assert config['aft']['steps'] == 8 and config['aft_universal']['eps'] == pytest.approx(20 / 255)
    assert 'of triggered images are still classified as' in (run_files.report / 'index.html').read_text()
    assert trigger_gallery.read(run_files.report / 'triggers.png').std() > 0
    assert trigger_gallery.read(run_files.report / 'before_after.png').std() > 0
    assert list((badnets_run / 'tensorboard').rglob('events*'))


def test_write_manifest_lists_the_poisoned_images(badnets_run):
    with np.load(RunFiles(badnets_run).poison_manifest, allow_pickle=False) as manifest:
        assert len(manifest['poisoned_indices']) == 26  # 10 % of 256
        assert len(manifest['clean_indices']) == 64
        assert not set(manifest['poisoned_indices']) & set(manifest['clean_indices'])
        np.testing.assert_array_equal(manifest['target_map'], [2, 2, 2, 2])
        assert manifest['trigger_pattern'].shape == (12, 12, 1)


def test_run_experiment_keeps_the_results_of_an_earlier_start(npz, badnets_run, capsys):
    before = json.loads((badnets_run / 'results.json').read_text())
    assert run(npz, badnets_run, capsys, *BADNETS, '--config.stages=("infect",)') == before


@pytest.mark.parametrize(
    'attack',
    [
        ('--config.attack.name=sig', '--config.attack.sig.clean_label', '--config.attack.poisoned_share=0.5'),
        (
            '--config.attack.name=sig',
            '--config.attack.label_mode=all2all',
            '--config.attack.poisoning=per_batch',
            NO_REPORT,
        ),
        ('--config.attack.name=none',),
    ],
)
def test_run_experiment_with_other_attacks(attack, npz, tmp_path, capsys):
    results = run(npz, tmp_path / 'run', capsys, '--config.defenses=ft', '--config.run.evaluate_every=1.5', *attack)
    assert results['infected']['acc'] > 0.9
    benign = attack == ('--config.attack.name=none',)
    assert (results['infected']['asr'] is None) == benign
    assert (results['purified']['ft']['der'] is None) == benign
    probes = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert [p['step'] for p in probes if 'test_acc' in p] == [24, 48, 72, 96]
    assert all(('test_asr' in p) != benign for p in probes if 'test_acc' in p)


def test_claim_lets_a_later_start_add_a_defense_with_its_options(npz, tmp_path, capsys):
    released = ('--config.aft_released.epochs=1', '--config.aft_released.adversarial_epochs=1')
    # Without a purification, the defender has not chosen its images yet.
    run(npz, tmp_path / 'run', capsys, *released, '--config.stages=("infect",)', '--config.clean_share=0.1')
    first = run(npz, tmp_path / 'run', capsys, *released, '--config.defenses=aft_released', NO_REPORT)
    assert first['clean_share'] == 0.25
    other = (*released, '--config.ft.max_grad_norm=0.5')
    both = run(npz, tmp_path / 'run', capsys, *other, '--config.defenses=aft_released,ft', NO_REPORT)
    assert both['purified'].keys() == {'aft_released', 'ft'}
    assert both['purified']['aft_released'] == first['purified']['aft_released']
    assert both['infected'] == first['infected']
    kept = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert kept['ft']['max_grad_norm'] == 0.5 and kept['aft_released']['eps'] == 6 / 255
    # A later start keeps what was measured. The options of a measured defense are fixed.
    assert run(npz, tmp_path / 'run', capsys, *other, '--config.stages=("infect",)') == both
    status, text = run_here([*arguments_of(npz, tmp_path / 'run'), *released, '--config.ft.max_grad_norm=0.75'], capsys)
    assert status == 2 and 'ft.max_grad_norm is 0.5 there and 0.75 here' in text and len(text.splitlines()) == 1
    status, text = run_here([*arguments_of(npz, tmp_path / 'run'), *other, '--config.clean_share=0.2'], capsys)
    assert status == 2 and 'clean_share is 0.25 there and 0.2 here' in text


def test_claim_refuses_other_data_under_the_same_name(npz, tmp_path, capsys):
    npz = shutil.copy(npz, tmp_path / 'changing.npz')
    workdir = tmp_path / 'run'
    infect_only = '--config.stages=("infect",)'
    workdir.mkdir()
    (workdir / '.config.json.abc').write_text('{')  # of a process that was killed in its first moment
    run(npz, workdir, capsys, infect_only)
    with np.load(npz) as arrays:
        changed = dict(arrays)
    changed['train_images'][0, 0, 0, 0] ^= 1
    np.savez(npz, **changed)
    arguments = [f'--config={ROOT}/configs/mnist5k.py', f'--workdir={workdir}', f'--config.dataset=npz:{npz}']
    arguments += ['--config.batch_size=16', '--config.clean_share=0.25', infect_only]
    status, text = run_here(arguments, capsys)
    assert status == 2 and 'has changed since the run' in text and len(text.splitlines()) == 1


def test_run_experiment_with_a_preact_resnet_on_colour_images(tmp_path, capsys):
    generator = np.random.default_rng(4)
    labels = np.arange(80) % 2
    images = (generator.integers(0, 120, (80, 8, 8, 3)) + 120 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(
        tmp_path / 'colour.npz',
        train_images=images[:64],
        train_labels=labels[:64],
        test_images=images[64:],
        test_labels=labels[64:],
    )
    results = run(
        tmp_path / 'colour.npz',
        tmp_path / 'run',
        capsys,
        '--config.model.name=preact_resnet',
        '--config.model.width=4',
        '--config.seed=1',
        '--config.model.mean=(0.5,0.5,0.5)',
        '--config.dtype=bfloat16',
        '--config.defenses=ft',
        '--config.attack.label_mode=all2all',
        NO_REPORT,
    )
    assert results['infected']['acc'] > 0.9
