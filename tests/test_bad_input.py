"""Mistakes of the user: each gives one sentence that says what to do, and exit status 2."""

import json
import re

import numpy as np
import pytest
from command import ROOT, run_here, start

from aft_jax import main, relapse, sweep
from aft_jax.analysis import __main__ as analysis
from aft_jax.report import table_page
from aft_jax.results import __main__ as results

CONFIG = f'--config={ROOT}/configs/quickstart.py'
HUGE = 10**6


def assert_one_sentence(status: int, text: str, expected: str):
    assert status == 2, text
    assert text.startswith('aft_jax: ') and 'Traceback' not in text
    assert len(text.strip().splitlines()) == 1
    assert re.search(expected, text), text


@pytest.fixture
def npz(tmp_path):
    generator = np.random.default_rng(0)
    path = tmp_path / 'mine.npz'
    np.savez(
        path,
        train_images=generator.integers(0, 256, (400, 12, 12, 1), np.uint8),
        train_labels=np.arange(400) % 4,
        test_images=generator.integers(0, 256, (40, 12, 12, 1), np.uint8),
        test_labels=np.arange(40) % 4,
    )
    return f'--config.dataset=npz:{path}'


# Mistakes in the config itself, which are found before any data is read.
CONFIG_MISTAKES = {
    '--config.dataset=mnist5': "mnist5k.*npz:PATH.*Did you mean 'mnist5k'",
    '--config.attack.name=bled': "badnets, blend, sig.*Did you mean 'blend'",
    '--config.attack.label_mode=all2none': 'all2one, all2all',
    '--config.attack.poisoning=once': 'fixed, per_batch',
    '--config.model.stem=imagenette': "imagenet, cifar.*Did you mean 'imagenet'",
    '--config.model.hidden=0': 'model.hidden=0 must be positive',
    '--config.model.name=preact_resnet20': "mnist_cnn, preact_resnet.*Did you mean 'preact_resnet'",
    '--config.defenses=aft,fft': "defenses='fft' does not exist.*ft, aft",
    '--config.dtype=float16': 'float32, bfloat16',
    '--config.aft_universal.preset=paper': 'released, default',
    '--config.aft_universal.norm=l1': 'linf, l2',
    '--config.aft.universal=linf,wrap': "aft.universal='wrap' does not exist.*warp",
    '--config.aft.per_image=sparse': "aft.per_image='sparse' does not exist",
    '--config.aft.reference_steps=0': 'aft.reference_steps=0 must be positive',
    '--config.aft.averaging=1.0': 'aft.averaging=1.0 must be at least 0 and below 1',
    '--config.aft_universal.warp_share=2.0': 'aft_universal.warp_share=2.0 is a share: at least 0 and at most 1',
    '--config.aft_universal.renew_every=0': 'aft_universal.renew_every=0 must be positive',
    '--config.aft_universal.cutmix=1.5': 'aft_universal.cutmix=1.5 is a share',
    '--config.train.schedule=step': 'constant, cosine',
    '--config.stages=("infekt",)': 'infect, purify, report',
    '--config.stages=("purify",)': "must contain 'infect'",
    '--config.atack.name=sig': "no field 'atack' in config; it has .*attack.*Did you mean 'attack'",
    '--config.attack.nam=sig': "no field 'nam' in config.attack; it has .*name",
    '--config.seed.x=1': 'config.seed is a value',
    '--config.seed=abc': 'seed=abc',
    '--config.seed=-1': 'seed=-1 must lie between',
    '--config.clean_share=0': 'clean_share=0.* above 0 and at most 1',
    '--config.clean_share=5': 'clean_share=5.* above 0 and at most 1',
    '--config.clean_share=1': 'clean_share=1.* strictly between 0 and 1; 1 is for init_from',
    '--config.attack.poisoned_share=1.0': 'poisoned_share=1.0 must lie strictly between 0 and 1',
    '--config.aft_universal.eps=8': r'aft_universal.eps=8 is in units of \[0, 1\] pixels; 8/255 is written as 0.031373',
    '--config.attack.sig.delta=20': '20/255 is written as 0.078431',
    '--config.aft_universal.step_size=0': 'aft_universal.step_size=0.0 must be positive',
    '--config.aft_universal.adversarial_epochs=1000': 'more than aft_universal.epochs',
    '--config.attack.target=-1': 'attack.target=-1 must be at least 0',
    '--config.batch_size=0': 'batch_size=0 must be positive',
    '--config.train.learning_rate=-0.1': 'train.learning_rate=-0.1 must be positive',
    '--config.attack.blend.alpha=1.5': 'attack.blend.alpha=1.5 is a share',
    '--config.model.std=(0.0,)': r'model.std=\(0.0,\) must be positive',
    '--config.train.learning_rate=nan': 'train.learning_rate=nan should be a finite number',
    '--config.aft_universal.eps=inf': 'aft_universal.eps=inf should be',
    "--config.model.mean=('a',)": 'model.mean=.* should be',
    '--config.data.pad=100000': 'data.pad=100000 must lie between 0 and 4096',
    '--config.aft_universal.adversarial_share=0.001': 'at least one image of a batch',
    '--confg=x': 'Did you mean.*config',
    'quickstart': "'quickstart' is not a flag",
}


@pytest.mark.parametrize('argument', CONFIG_MISTAKES)
def test_main_explains_a_config_mistake(argument, tmp_path, capsys):
    workdir = tmp_path / 'run'
    status, text = run_here([CONFIG, f'--workdir={workdir}', argument], capsys)
    assert_one_sentence(status, text, CONFIG_MISTAKES[argument])
    assert not workdir.exists()


def test_validate_refuses_all2all_with_clean_labels(tmp_path, capsys):
    arguments = ['--config.attack.name=sig', '--config.attack.sig.clean_label', '--config.attack.label_mode=all2all']
    status, text = run_here([CONFIG, f'--workdir={tmp_path}/run', *arguments], capsys)
    assert_one_sentence(status, text, "needs attack.label_mode='all2one'")


def test_parse_requires_config_and_workdir(tmp_path, capsys):
    assert_one_sentence(*run_here([f'--workdir={tmp_path}'], capsys), '--config is missing')
    assert_one_sentence(*run_here([CONFIG], capsys), '--workdir is missing')
    assert_one_sentence(*run_here(['--config=configs/no.py', f'--workdir={tmp_path}'], capsys), 'no.py does not exist')


def test_parse_reports_a_config_file_that_fails(tmp_path, capsys):
    broken = tmp_path / 'broken.py'
    broken.write_text('def get_config():\n    return 1 / 0\n')
    arguments = [f'--config={broken}', f'--workdir={tmp_path}/run']
    assert_one_sentence(*run_here(arguments, capsys), 'division by zero')
    assert_one_sentence(*run_here([*arguments, '--config.seed=1'], capsys), 'division by zero')


def test_validate_refuses_a_config_file_with_other_fields(tmp_path, capsys):
    text = (
        'from aft_jax.config import default_config\ndef get_config():\n    c = default_config()\n    {}\n    return c\n'
    )
    mistakes = {
        'c.train.learning_rte = 5.0': "'train.learning_rte' that does not exist. Did you mean 'train.learning_rate'",
        'del c.model': "lacks the field 'model.",
        'c.train.unlock(); c.train["epochs"] = "x"': 'cannot be .*epochs',
    }
    for i, (line, expected) in enumerate(mistakes.items()):
        path = tmp_path / f'config{i}.py'
        path.write_text(text.format(line))
        assert_one_sentence(*run_here([f'--config={path}', f'--workdir={tmp_path}/run'], capsys), expected)


def test_validate_refuses_a_share_below_one_image_of_a_batch(tmp_path, capsys):
    arguments = ['--config.attack.poisoning=per_batch', '--config.attack.poisoned_share=0.001']
    status, text = run_here([CONFIG, f'--workdir={tmp_path}/run', *arguments], capsys)
    assert_one_sentence(status, text, 'poisoned_share=0.001 of a batch of 128 is less than one image')


def test_user_path_refuses_the_home_of_an_unknown_user(capsys):
    assert_one_sentence(
        *run_here([CONFIG, '--workdir=~nobody-at-all/run'], capsys), 'home of a user who does not exist'
    )


# Mistakes that depend on the data. `npz` has 400 training images of 12x12 in 4 classes.
DATA_MISTAKES = {
    '--config.attack.target=4': 'attack.target=4 is not a label .* 4 classes',
    '--config.batch_size=404': 'batch_size=404 is larger than the training set .* 400 images',
    '--config.clean_share=0.1': 'is 40, fewer than a batch .*raise clean_share to at least 0.3200',
    '--config.clean_share=0.95': 'needs 380 clean images, but only 360 are not poisoned',
    '--config.attack.poisoned_share=0.0001': 'less than one image',
    '--config.batch_size=130': 'batch_size=130 cannot be divided among 4 devices; 128 or 132 would work',
    '--config.augment.crop=12': 'moves images of 12x12 out of their frame',
    '--config.model.mean=(0.5,0.5,0.5)': 'model.mean has 3 values, .* 1 channel;',
    '--config.attack.badnets.row=11': 'does not fit images of 12x12',
    '--config.attack.badnets.pattern=01/1': 'rows of 0 and 1 of one length',
}


@pytest.mark.parametrize('argument', DATA_MISTAKES)
def test_main_explains_a_data_mistake(argument, npz, tmp_path, capsys):
    arguments = [npz, '--config.attack.name=badnets', '--config.clean_share=0.5', argument]
    status, text = run_here([CONFIG, f'--workdir={tmp_path}/run', *arguments], capsys)
    assert_one_sentence(status, text, DATA_MISTAKES[argument])
    assert not (tmp_path / 'run').exists()  # the corrected command can use it


def test_validate_against_data_refuses_images_too_small_for_vgg(npz, tmp_path, capsys):
    arguments = [npz, '--config.clean_share=0.5', '--config.model.name=vgg_bn']
    status, text = run_here([CONFIG, f'--workdir={tmp_path}/run', *arguments], capsys)
    assert_one_sentence(status, text, 'model.depth=18 does not exist; choose one of 11, 13, 16, 19')
    status, text = run_here([CONFIG, f'--workdir={tmp_path}/run', *arguments, '--config.model.depth=11'], capsys)
    assert_one_sentence(status, text, 'vgg_bn needs images of 32x32 or more.* are 12x12; set data.pad or data.size')


def test_main_reports_a_pattern_that_is_no_picture(npz, tmp_path, capsys):
    (tmp_path / 'notes.txt').write_text('not a picture')
    arguments = [npz, '--config.clean_share=0.5', f'--config.attack.blend.pattern_path={tmp_path}/notes.txt']
    status, text = run_here([CONFIG, f'--workdir={tmp_path}/run', *arguments], capsys)
    assert_one_sentence(status, text, 'notes.txt cannot be read as a picture')


def test_main_reports_missing_data(tmp_path, capsys):
    status, text = run_here([CONFIG, f'--workdir={tmp_path}/run', f'--config.dataset=npz:{tmp_path}/no.npz'], capsys)
    assert_one_sentence(status, text, 'no.npz')
    (tmp_path / 'pictures' / 'cats').mkdir(parents=True)
    (tmp_path / 'pictures' / 'dogs').mkdir(parents=True)
    status, text = run_here(
        [CONFIG, f'--workdir={tmp_path}/run', f'--config.dataset=folder:{tmp_path}/pictures'], capsys
    )
    assert_one_sentence(status, text, 'cats')


def test_main_leaves_a_workdir_of_another_config_alone(npz, tmp_path, capsys):
    workdir = tmp_path / 'run'
    workdir.mkdir()
    arguments = [CONFIG, f'--workdir={workdir}', npz, '--config.clean_share=0.5']
    other = {'dataset': 'mnist5k', 'seed': 7}
    (workdir / 'config.json').write_text(json.dumps(other))
    assert_one_sentence(*run_here(arguments, capsys), 'belongs to another config .*seed is 7 there and 0 here')
    assert json.loads((workdir / 'config.json').read_text()) == other
    (workdir / 'config.json').write_text('{"datas')
    assert_one_sentence(*run_here(arguments, capsys), 'config.json is damaged')


def test_main_leaves_a_directory_of_other_files_alone(npz, tmp_path, capsys):
    (tmp_path / 'thesis.tex').write_text('...')
    status, text = run_here([CONFIG, f'--workdir={tmp_path}', npz, '--config.clean_share=0.5'], capsys)
    assert_one_sentence(status, text, 'holds other files')


def test_main_reports_an_unwritable_workdir(npz, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    status, text = run_here([CONFIG, f'--workdir={tmp_path}/file/run', npz, '--config.clean_share=0.5'], capsys)
    assert_one_sentence(status, text, 'cannot be written')
    status, text = run_here([CONFIG, '--workdir=/proc/run', npz, '--config.clean_share=0.5'], capsys)
    assert_one_sentence(status, text, '/proc/run cannot be written')


def test_main_reports_a_loss_that_is_not_finite(npz, tmp_path, capsys):
    arguments = [npz, '--config.clean_share=0.5', f'--config.train.learning_rate={HUGE}', '--config.train.epochs=1']
    status, text = run_here([CONFIG, f'--workdir={tmp_path}/run', *arguments], capsys)
    assert_one_sentence(
        status, text.splitlines()[-1], 'infect stopped .* no longer a finite number; lower its learning rate'
    )


def test_main_reports_a_compile_cache_that_cannot_be_made(tmp_path, npz, capsys):
    (tmp_path / 'file').write_text('')
    arguments = [CONFIG, f'--workdir={tmp_path}/run', npz, f'--config.run.compile_cache={tmp_path}/file/cache']
    assert_one_sentence(*run_here(arguments, capsys), 'run.compile_cache=.*cannot be created')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'arguments, expected',
    [
        (['--process_id=1'], 'need --distributed'),
        (['--distributed', '--process_id=1'], 'give all three, or none'),
        (['--distributed', '--num_processes=2', '--process_id=0'], 'give all three, or none'),
        (['--distributed', '--coordinator=here', '--num_processes=2', '--process_id=0'], 'must be HOST:PORT'),
        (['--distributed', '--coordinator=localhost:1', '--num_processes=2', '--process_id=2'], 'between 0 and 1'),
    ],
)
def test_join_refuses_wrong_flags(arguments, expected, tmp_path, capsys):
    assert_one_sentence(*run_here([CONFIG, f'--workdir={tmp_path}/run', *arguments], capsys), expected)


def test_join_reports_that_there_is_no_job(tmp_path):
    process = start([CONFIG, f'--workdir={tmp_path}/run', '--distributed'], tmp_path / 'log')
    assert process.wait(timeout=120) == 2
    assert_one_sentence(2, (tmp_path / 'log').read_text(), 'found no job to join')


def test_main_in_its_own_process_explains_a_mistake(tmp_path):
    process = start([CONFIG, f'--workdir={tmp_path}/run', '--config.attack.name=bled'], tmp_path / 'log')
    assert process.wait(timeout=60) == 2
    assert_one_sentence(2, (tmp_path / 'log').read_text(), "Did you mean 'blend'")


def test_main_reports_a_data_set_that_cannot_be_downloaded(tmp_path):
    nobody = 'http://127.0.0.1:9'  # the discard port: no proxy listens there
    proxies = {name: nobody for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY')}
    arguments = [
        f'--config={ROOT}/configs/cifar10.py',
        f'--workdir={tmp_path}/run',
        f'--config.data.dir={tmp_path}/data',
    ]
    process = start(arguments, tmp_path / 'log', no_proxy='', NO_PROXY='', **proxies)
    assert process.wait(timeout=120) == 2
    last = (tmp_path / 'log').read_text().splitlines()[-1]
    assert_one_sentence(2, last, f'cifar10.*{tmp_path}/data.*(could not be downloaded|pip install aft_jax.prepare)')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('command', [main, sweep, analysis, relapse, results, table_page])
def test_run_prints_help(command, capsys):
    assert command.main(['aft_jax', '--help']) == 0
    assert capsys.readouterr().out == f'{command.__doc__}\n'


@pytest.mark.parametrize('command', [analysis, relapse, results, table_page])
def test_run_prints_help_without_arguments(command, capsys):
    assert command.main([]) == 2
    assert capsys.readouterr().out == f'{command.__doc__}\n'


@pytest.mark.parametrize('command', [analysis, relapse, results, table_page])
def test_run_explains_an_unknown_flag(command, capsys):
    assert command.main(['x', '--moon=1']) == 2
    assert_one_sentence(2, capsys.readouterr().err, 'the command line cannot be understood')
