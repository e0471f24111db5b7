"""The whole story on a tiny data set: every attack's room, both label modes, both poisonings."""

import json

import numpy as np
import pytest
from command import ROOT, run_here

from aft_jax.analysis import observe
from aft_jax.report import experiment_report

NO_REPORT = '--config.stages=("infect","purify")'


@pytest.fixture(autouse=True)
def few_exhibits(monkeypatch):
    """Adversarial examples of 12 images and two sizes are enough to see that they are shown."""
    monkeypatch.setattr(experiment_report, 'IMAGES', 16)
    monkeypatch.setattr(experiment_report, 'SWEPT_EPS', (4 / 255, observe.EPS))


@pytest.fixture
def npz(tmp_path):
    generator = np.random.default_rng(3)
    labels = np.arange(320) % 4
    images = generator.integers(0, 120, (320, 12, 12, 1))
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[row * 6 : row * 6 + 6, column * 6 : column * 6 + 6] += 100
    images = images.astype(np.uint8)
    path = tmp_path / 'tiny.npz'
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
        '--config.aft.epochs=2',
        '--config.aft.adversarial_epochs=1',
        '--config.aft.pgd_steps=2',
    ]


def run(npz, workdir, capsys, *more):
    status, text = run_here([*arguments_of(npz, workdir), *more], capsys)
    assert status == 0, text
    return json.loads((workdir / 'results.json').read_text())


def test_results_of_an_all2one_run(npz, tmp_path, capsys):
    workdir = tmp_path / 'run'
    results = run(npz, workdir, capsys, '--config.attack.name=badnets', '--config.attack.target=2')
    assert {k: results[k] for k in ('schema', 'dataset', 'model', 'attack', 'label_mode', 'seed')} == {
        'schema': 1,
        'dataset': f'npz:{npz}',
        'model': 'mnist_cnn',
        'attack': 'badnets',
        'label_mode': 'all2one',
        'seed': 0,
    }
    assert results['environment']['devices'] == 4 and results['environment']['processes'] == 1
    infected, aft = results['infected'], results['purified']['aft']
    assert infected['acc'] > 0.9 and infected['asr'] > 0.5
    assert infected['per_class']['asr'][2] is None  # the target class cannot be attacked
    assert np.isclose(infected['asr'], np.mean([x for x in infected['per_class']['asr'] if x is not None]))
    expected = (max(0, infected['asr'] - aft['asr']) - max(0, infected['acc'] - aft['acc']) + 1) / 2
    assert aft['der'] == pytest.approx(expected) and aft['seconds'] > 0
    stages = {json.loads(line)['stage'] for line in (workdir / 'metrics.jsonl').read_text().splitlines()}
    assert stages == {'infect', 'purify/ft', 'purify/aft'}
    assert json.loads((workdir / 'config.json').read_text())['aft']['eps'] == pytest.approx(20 / 255)
    assert (workdir / 'report' / 'before_after.png').stat().st_size > 10_000
    assert 8 < results['connection']['images'] < 16 and results['connection']['purified'].keys() == {'ft', 'aft'}
    assert 'of triggered images still obey' in (workdir / 'report' / 'index.html').read_text()
    # A later start that shows nothing keeps what was seen.
    attack = ('--config.attack.name=badnets', '--config.attack.target=2')
    assert run(npz, workdir, capsys, *attack, '--config.stages=("infect",)') == results
    assert list((workdir / 'tensorboard').rglob('events*'))


def test_the_manifest_tells_who_was_poisoned(npz, tmp_path, capsys):
    run(npz, tmp_path / 'run', capsys, '--config.attack.name=blend', '--config.stages=("infect",)')
    with np.load(tmp_path / 'run' / 'poison.npz', allow_pickle=False) as manifest:
        assert len(manifest['poisoned_indices']) == 26  # 10 % of 256
        assert len(manifest['clean_indices']) == 64
        assert not set(manifest['poisoned_indices']) & set(manifest['clean_indices'])
        np.testing.assert_array_equal(manifest['target_map'], [0, 0, 0, 0])
        assert manifest['trigger_pattern'].shape == (12, 12, 1)


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
def test_other_ways_run_too(attack, npz, tmp_path, capsys):
    results = run(npz, tmp_path / 'run', capsys, '--config.defenses=ft', '--config.run.evaluate_every=1.5', *attack)
    assert results['infected']['acc'] > 0.9
    benign = attack == ('--config.attack.name=none',)
    assert (results['infected']['asr'] is None) == benign
    assert (results['purified']['ft']['der'] is None) == benign
    probes = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert [p['step'] for p in probes if 'test_acc' in p] == [24, 48, 72, 96]
    assert all(('test_asr' in p) != benign for p in probes if 'test_acc' in p)


def test_a_defense_can_be_added_later_with_its_own_recipe(npz, tmp_path, capsys):
    released = ('--config.aft_released.epochs=1', '--config.aft_released.adversarial_epochs=1')
    # Nor has the defender chosen its images before.
    run(npz, tmp_path / 'run', capsys, *released, '--config.stages=("infect",)', '--config.clean_share=0.1')
    first = run(npz, tmp_path / 'run', capsys, *released, '--config.defenses=aft_released', NO_REPORT)
    assert first['clean_share'] == 0.25
    other = (*released, '--config.aft.eps=0.02')
    both = run(npz, tmp_path / 'run', capsys, *other, '--config.defenses=aft_released,aft', NO_REPORT)
    assert both['purified'].keys() == {'aft_released', 'aft'}
    assert both['purified']['aft_released'] == first['purified']['aft_released']
    assert both['infected'] == first['infected']
    kept = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert kept['aft']['eps'] == 0.02 and kept['aft_released']['eps'] == 6 / 255
    # What was measured stays, whatever a later start asks for, and its recipe is settled.
    assert run(npz, tmp_path / 'run', capsys, *other, '--config.stages=("infect",)') == both
    status, text = run_here([*arguments_of(npz, tmp_path / 'run'), *released, '--config.aft.eps=0.03'], capsys)
    assert status == 2 and 'aft.eps is 0.02 there and 0.03 here' in text and len(text.splitlines()) == 1
    status, text = run_here([*arguments_of(npz, tmp_path / 'run'), *other, '--config.clean_share=0.2'], capsys)
    assert status == 2 and 'clean_share is 0.25 there and 0.2 here' in text


def test_other_data_under_the_same_name_are_noticed(npz, tmp_path, capsys):
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


def test_a_preact_resnet_on_colour(tmp_path, capsys):
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
