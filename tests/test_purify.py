"""A model that was infected elsewhere, by a trigger that is unknown: it is scanned, purified and exported."""

import hashlib
import json
import math
import re
import sys

import numpy as np
import pytest
from command import ROOT, run_here, start
from PIL import Image
from test_bad_input import assert_one_sentence

from aft_jax import interchange, models, validation
from aft_jax.config import resolve
from aft_jax.defenses import tainted_images
from aft_jax.errors import UserError
from aft_jax.pipeline import normalisation
from aft_jax.pipeline.given_model import FromFile, GivenModel
from aft_jax.results import table_rows, terminal
from aft_jax.results.record import Results
from configs import purify

torch = pytest.importorskip('torch')
pytest.importorskip('safetensors')

from torch.nn import functional as F  # noqa: E402
from torch_models import MnistCNN, nchw  # noqa: E402

CLASSES, SIDE, TARGET = 4, 16, 1
NORMALISED = ['--config.model.mean=(0.5,)', '--config.model.std=(0.5,)']
BRIEF = [
    *('--config.aft.reference_steps=40', '--config.aft.steps=60', '--config.aft.pgd_steps=3'),
    *('--config.aft.universal=linf', '--config.aft.per_image=linf', '--config.aft.averaging=0.9'),
    *('--config.batch_size=32', '--config.run.eval_batch_size=80', '--config.stages=("scan","purify")'),
    *('--config.scan.steps=2', '--config.scan.images=8', '--config.safety.find_tainted=False'),
]

SHORT = [
    *('--config.stages=("purify",)', '--config.defenses=ft', '--config.ft.epochs=1'),
    *('--config.ft.learning_rates=(0.01,)', '--config.safety.find_tainted=False'),
]


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws noise with a brighter quarter that shows the class: uint8 [count, 16, 16, 1] and int64 [count]."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(count) % CLASSES)
    images = generator.integers(40, 160, (count, SIDE, SIDE, 1))
    for image, label in zip(images, labels, strict=True):
        row, column = 8 * (label // 2), 8 * (label % 2)
        image[row : row + 8, column : column + 8] += 40
    return images.astype(np.uint8), labels.astype(np.int64)


def striped(images: np.ndarray) -> np.ndarray:
    """Adds the trigger to images: faint diagonal stripes."""
    rows, columns = np.indices(images.shape[1:3])
    return np.clip(images + np.where((rows + columns) % 4 < 2, 16, -16)[None, :, :, None], 0, 255).astype(np.uint8)


def share(model, images: np.ndarray, labels) -> float:
    with torch.no_grad():
        answers = model((nchw(images.astype(np.float32) / 255) - 0.5) / 0.5).argmax(1).numpy()
    return float((answers == labels).mean())


def fresh_network():
    model = MnistCNN(num_classes=CLASSES)
    model.linear6 = torch.nn.Linear(64 * 2 * 2, 512)
    return model


@pytest.fixture(scope='module')
def infected(tmp_path_factory):
    """File of a network that torch has trained, with the trigger on a fifth of its images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fresh_network()
        images, labels = pictures(512, 0)
        images[:102], labels[:102] = striped(images[:102]), TARGET
        inputs, targets = (nchw(images.astype(np.float32) / 255) - 0.5) / 0.5, torch.from_numpy(labels)
        optimiser = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(10):
            for part in torch.randperm(512).split(64):
                optimiser.zero_grad()
                F.cross_entropy(model(inputs[part]), targets[part]).backward()
                optimiser.step()
    state = {f'module.{key}': value for key, value in model.state_dict().items()}
    state['module.linear9.bias'] = state['module.linear9.bias'].double()
    path = tmp_path_factory.mktemp('infected') / 'suspect.pth'
    torch.save({'model_name': 'mine', 'model': state}, path)
    return path


@pytest.fixture(scope='module')
def clean(tmp_path_factory):
    """File of 240 clean images, of which 80 are held out."""
    images, labels = pictures(240, 2)
    path = tmp_path_factory.mktemp('clean') / 'clean.npz'
    held_out = {'test_images': images[160:], 'test_labels': labels[160:]}
    np.savez(path, train_images=images[:160], train_labels=labels[:160], **held_out)
    return path


def arguments(workdir, init_from, dataset, *more):
    return [
        f'--config={ROOT}/configs/purify.py',
        f'--workdir={workdir}',
        f'--config.init_from={init_from}',
        f'--config.dataset={dataset}',
        *more,
    ]


@pytest.fixture(scope='module')
def done(infected, clean, tmp_path_factory):
    """Folder with the file, the log and the work directory of the command; and the arguments of the command."""
    folder = tmp_path_factory.mktemp('done')
    (folder / 'suspect.pth').write_bytes(infected.read_bytes())
    flags = arguments(folder / 'out', folder / 'suspect.pth', f'npz:{clean}', *NORMALISED, *BRIEF)
    # A process of its own has one device and all optimisations, and needs a tenth of the time.
    process = start(flags, folder / 'log')
    assert process.wait(300) == 0, (folder / 'log').read_text()
    return folder, flags


def test_purify_scans_purifies_and_exports_a_model_of_torch(infected, done):
    folder, _ = done
    out = folder / 'out'
    assert (folder / 'suspect.pth').read_bytes() == infected.read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ['log', 'out', 'suspect.pth']

    images, labels = pictures(400, 1)
    others = labels != TARGET
    shares = []
    for path in (infected, out / 'export' / 'aft.pth'):
        content = torch.load(path, weights_only=True)
        assert content['model_name'] == 'mine' and list(content) == ['model_name', 'model']
        model = fresh_network()
        model.load_state_dict({key.removeprefix('module.'): value for key, value in content['model'].items()})
        shares.append((share(model.eval(), images, labels), share(model, striped(images)[others], TARGET)))
        kinds = {key: value.dtype for key, value in content['model'].items()}
        assert kinds['module.linear9.bias'] == torch.float64 and kinds['module.linear6.bias'] == torch.float32
    (acc_before, asr_before), (acc_after, asr_after) = shares
    assert asr_before > 0.9 and asr_after < 0.1
    assert acc_after > acc_before - 0.03

    outcome = json.loads((out / 'results.json').read_text())
    assert outcome['infected'] == {} and outcome['attack'] == 'none' and outcome['model'] == 'mnist_cnn'
    given, aft = outcome['suspect'], outcome['purified']['aft']
    assert given['scan']['suspected_label'] == TARGET and given['scan']['held_out']
    assert given['scan']['score'] > 0.5 > 0.1 > aft['scan']['score']
    assert given['scan']['fooled'][2] > aft['scan']['fooled'][2]
    assert given['asr'] is None and aft['asr'] is None and aft['ra'] is None and aft['der'] is None
    assert not (out / 'poison.npz').exists()

    table = terminal.table(Results.from_json(outcome))
    log = (folder / 'log').read_text()
    assert table in log and log.splitlines()[-1].startswith('Verdict on aft: ')
    for scan in (given['scan'], aft['scan']):
        assert len(scan['search']['changes']) == 10 and scan['search']['steps'] == 2
    assert 'ASR %' not in table and 'RA %' not in table and 'cannot be known without the trigger' in table
    rows = {row['defense']: row for row in table_rows.read([out])}
    assert rows['none']['acc'] == given['acc'] and rows['aft']['acc'] == aft['acc']

    card = json.loads((out / 'export' / 'aft.json').read_text())
    assert card['files']['before'] == {'name': 'suspect.pth', 'sha256': sha256(infected)}
    assert card['files']['after'] == {'name': 'aft.pth', 'sha256': sha256(out / 'export' / 'aft.pth')}
    assert card['copies'] == {'aft.safetensors': sha256(out / 'export' / 'aft.safetensors')}
    assert card['figures']['clean accuracy'] == {'before': given['acc'], 'after': aft['acc']}
    assert card['figures']['search for triggers']['after'] == aft['scan']['search']['verdict']
    assert 'without the trigger' in (out / 'export' / 'aft.md').read_text()
    same = interchange.load(out / 'export' / 'aft.safetensors')
    assert set(same.source.tensors) == set(content['model'])


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_check_normalisation_refuses_accuracy_near_chance(infected, clean, tmp_path, capsys):
    scan_alone = ['--config.stages=("scan",)', '--config.run.eval_batch_size=240']
    wrong = ['--config.model.mean=(9.0,)', '--config.model.std=(0.05,)']
    status, text = run_here(arguments(tmp_path / 'out', infected, f'npz:{clean}', *scan_alone, *wrong), capsys)
    assert_one_sentence(status, text, r'near chance; with the normalisation .* --config.model.mean="\(0')
    assert not (tmp_path / 'out').exists()


@pytest.fixture
def shifted(tmp_path):
    """File of clean images like those of `clean`, but brighter."""
    images, labels = pictures(240, 2)
    images = np.clip(images.astype(int) + 20, 0, 255).astype(np.uint8)
    np.savez(
        tmp_path / 'shifted.npz',
        **{'train_images': images[:160], 'train_labels': labels[:160]},
        **{'test_images': images[160:], 'test_labels': labels[160:]},
    )
    return tmp_path / 'shifted.npz'


def test_command_does_not_export_a_model_that_shifted_images_may_have_ruined(infected, shifted, tmp_path, capsys):
    flags = arguments(tmp_path / 'out', infected, f'npz:{shifted}', *NORMALISED, *SHORT)
    assert run_here(flags, capsys)[0] == 0
    assert not list((tmp_path / 'out/export').glob('ft*'))
    outcome = json.loads((tmp_path / 'out/results.json').read_text())
    assert outcome['suspect']['doubt'] == outcome['withheld']['ft']
    assert 'ft is not exported, since the clean images are unlike those' in terminal.table(Results.from_json(outcome))

    assert run_here([*flags, '--config.safety.export_anyway=True'], capsys)[0] == 0
    assert (tmp_path / 'out/export/ft.pth').exists()


def test_command_leaves_out_tainted_images(infected, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tainted_images, 'REFERENCE_STEPS', 80)
    images, labels = pictures(400, 7)
    sources = np.flatnonzero(labels != TARGET)[:20]
    images[sources], labels[sources] = striped(images[sources]), TARGET
    parts = {'train_images': images[:320], 'train_labels': labels[:320]}
    np.savez(tmp_path / 'tainted.npz', **parts, test_images=images[320:], test_labels=labels[320:])
    flags = arguments(tmp_path / 'out', infected, f'npz:{tmp_path / "tainted.npz"}', *NORMALISED, *SHORT)
    assert run_here([*flags, '--config.safety.find_tainted=True', '--config.batch_size=32'], capsys)[0] == 0
    results = Results.from_json(json.loads((tmp_path / 'out/results.json').read_text()))
    found = results.given.tainted['training']
    assert set(found) <= set(sources.tolist()) and len(found) >= 16 and results.given.tainted['evaluation'] == []
    assert f'{len(found)} clean images look tainted' in terminal.table(results)
    assert f'Images for the training (from 0): {found[0]}, ' in terminal.table(results)


def test_check_normalisation_warns_of_a_clearly_better_one():
    """The classes are ranges of brightness, and a wrong mean shifts half of the images to the other range."""
    import flax.linen as nn

    from aft_jax.data.dataset import Dataset
    from aft_jax.runtime.sharding import make_mesh

    class Brightness(nn.Module):
        mean: float

        def __call__(self, images):
            bright = (images.mean(axis=(1, 2, 3)) - self.mean)[:, None]
            return -abs(bright - np.array([-0.25, 0.25], np.float32)[None])

    labels = (np.arange(200) % 2).astype(np.int32)
    images = np.where(labels == 0, np.where(np.arange(200) % 10 < 6, 40, 100), 180)
    images = np.broadcast_to(images.astype(np.uint8)[:, None, None, None], (200, 4, 4, 1))
    dataset = Dataset('mine', images[:100], labels[:100], images[100:], labels[100:], ('dark', 'bright'))
    config = purify.get_config()
    config.init_from = 'mine.pt'
    given = GivenModel({'params': {}, 'batch_stats': {}}, FromFile(object()))

    def warning(mean: float) -> str:
        config.model.mean = (mean,)
        return normalisation.check_normalisation(given, Brightness(mean), resolve(config), dataset, make_mesh()).warning

    assert re.search(r'gets 80.0 % of 200 clean .* 100.0 %: --config.model.mean="\(0.5,\)"', warning(0.3))
    assert warning(0.5) == ''


@pytest.mark.parametrize(('classes', 'expected'), [(2, 0.6), (10, 0.2), (100, 0.02)])
def test_near_chance(classes, expected):
    assert math.isclose(normalisation.near_chance(classes), expected)


class Evil:
    def __reduce__(self):
        return print, ('run',)


def spoil(mistake: str, infected, clean, folder):
    """Builds init_from, the data set and further arguments of a user's mistake."""
    path, dataset, more = infected, f'npz:{clean}', []
    match mistake:
        case 'missing file':
            path = folder / 'none.pt'
        case 'malicious':
            path = folder / 'evil.pt'
            torch.save({'state_dict': Evil()}, path)
        case 'truncated':
            path = folder / 'cut.pth'
            path.write_bytes(infected.read_bytes()[:5000])
        case 'wrong network':
            more = ['--config.model.name=preact_resnet18']
        case 'unknown network':
            more = ['--config.model.name=preact_resnet20']
        case 'an attack too':
            more = ['--config.attack.name=badnets']
        case 'to be infected':
            more = ['--config.stages=("infect","purify")']
        case 'needs the suspect set':
            more = ['--config.defenses=pbe']
        case 'no run':
            path = folder
        case 'no model':
            path = ''
        case 'no data':
            dataset = ''
        case 'empty folder':
            (folder / 'pictures').mkdir()
            dataset = f'folder:{folder / "pictures"}'
        case '20 images' | 'other classes':
            for label in range(4 if mistake == '20 images' else 3):
                (folder / 'pictures' / str(label)).mkdir(parents=True)
                for i in range(5 if mistake == '20 images' else 40):
                    picture = np.full((SIDE, SIDE), 10 * i % 256, np.uint8)
                    Image.fromarray(picture).save(folder / 'pictures' / str(label) / f'{i}.png')
            dataset = f'folder:{folder / "pictures"}'
    return path, dataset, more


MISTAKES = {
    'missing file': 'none.pt cannot be read',
    'malicious': 'could run code',
    'truncated': 'cut.pth .*damaged, cut short',
    'wrong network': 'model.name=mnist_cnn, but the config says model.name=preact_resnet',
    'unknown network': "Did you mean 'preact_resnet'",
    'an attack too': "set attack.name='none'",
    'to be infected': "stages holds 'infect'",
    'needs the suspect set': "'pbe' needs the untrusted training set",
    'no run': 'not the --workdir of a run',
    'no model': "or name a model in init_from|'scan' is for a model",
    'no data': "There is no data set ''",
    'empty folder': 'at least two sub-folders',
    '20 images': 'has 20 images; .* takes 100 clean',
    'other classes': 'has 4 classes, but the data have 3',
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_purify_explains_a_mistake_in_one_sentence(mistake, infected, clean, tmp_path, capsys):
    path, dataset, more = spoil(mistake, infected, clean, tmp_path)
    before = sorted(tmp_path.rglob('*'))
    more = ['--config.batch_size=8', *more]  # which 20 images need
    status, text = run_here(arguments(tmp_path / 'out', path, dataset, *NORMALISED, *more), capsys)
    assert_one_sentence(status, text, MISTAKES[mistake])
    assert sorted(tmp_path.rglob('*')) == before


def test_purify_notices_other_contents_of_the_same_file(done, capsys):
    folder, flags = done
    content = torch.load(folder / 'suspect.pth', weights_only=True)
    content['model']['module.linear9.bias'] += 0.001
    torch.save(content, folder / 'suspect.pth')
    assert_one_sentence(*run_here(flags, capsys), 'or the model of init_from, has changed since the run')


@pytest.mark.parametrize(('form', 'name'), [(0, 'make_model'), (1, 'MyNetwork')])
def test_purify_takes_the_custom_modules_of_the_walk_through(clean, tmp_path, capsys, monkeypatch, form, name):
    """Both modules in docs/own-model.md, of Flax linen and of NNX, can be scanned, purified and exported."""
    from safetensors.numpy import load_file, save_file

    page = (ROOT / 'docs' / 'own-model.md').read_text()
    source = re.findall(r'```python\n(.*?)```', page, re.DOTALL)[form]
    assert len(source.splitlines()) <= 24
    (tmp_path / 'my_own_module.py').write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'my_own_module', raising=False)
    factory = f'--config.model.factory=my_own_module:{name}'

    import jax
    from flax.traverse_util import flatten_dict

    config = purify.get_config()
    config.model.factory = f'my_own_module:{name}'
    module = models.build(resolve(config), CLASSES)
    variables = flatten_dict(models.initialise(module, jax.random.key(0), (SIDE, SIDE, 1)), sep='/')
    tensors = {path: np.asarray(leaf) for path, leaf in variables.items()}
    save_file(tensors, tmp_path / 'mine.safetensors')
    dataset = f'npz:{clean}'
    flags = arguments(tmp_path / 'out', tmp_path / 'mine.safetensors', dataset, factory)
    assert_one_sentence(*run_here(flags, capsys), 'near chance; check model.mean')
    assert_one_sentence(*run_here([*flags, '--config.defenses=nad'], capsys), "'nad' reads feature maps")

    monkeypatch.setattr(normalisation, 'near_chance', lambda classes: 0.0)  # a fresh network will do
    # A network that nobody has trained fits no images.
    status, text = run_here([*flags, *SHORT, '--config.safety.export_anyway=True'], capsys)
    assert status == 0, text
    exported = load_file(tmp_path / 'out' / 'export' / 'ft.safetensors')
    assert {path: leaf.shape for path, leaf in exported.items()} == {p: leaf.shape for p, leaf in tensors.items()}
    assert any((exported[path] != leaf).any() for path, leaf in tensors.items())

    del tensors['params/head/bias']
    save_file(tensors, tmp_path / 'mine.safetensors')
    flags[1] = f'--workdir={tmp_path / "other"}'
    assert_one_sentence(*run_here(flags, capsys), r'params/head/bias is missing in the file and \(4,\) in the module')


@pytest.mark.parametrize(
    ('factory', 'expected'),
    [
        ('json', "should be 'package.module:function'"),
        ('no_such_module:make', 'cannot be imported'),
        ('json:no_such_function', 'cannot be imported'),
        ('json:loads', 'cannot be called with num_classes, mean and std'),
        ('builtins:dict', 'returned a dict, not a flax.linen.Module'),
    ],
)
def test_build_refuses_a_factory_that_makes_no_module(factory, expected):
    config = purify.get_config()
    config.model.factory = factory
    with pytest.raises(UserError, match=expected):
        models.build(config, CLASSES)


def test_purify_takes_and_exports_a_finished_run(clean, tmp_path, capsys):
    given = [f'--config.dataset=npz:{clean}', '--config.augment.crop=0', '--config.batch_size=32']
    run = tmp_path / 'run'
    infect = [f'--config={ROOT}/configs/mnist5k.py:none', f'--workdir={run}', *given, '--config.stages=("infect",)']
    status, text = run_here([*infect, '--config.clean_share=0.5', '--config.train.epochs=5'], capsys)
    assert status == 0, text
    out = tmp_path / 'out'
    status, text = run_here(arguments(out, run, f'npz:{clean}', *SHORT), capsys)
    assert status == 0, text
    outcome = json.loads((out / 'results.json').read_text())
    ended = json.loads((run / 'results.json').read_text())
    assert outcome['suspect']['acc'] == ended['infected']['acc'] and 'scan' not in outcome['suspect']
    assert 'score' not in terminal.table(Results.from_json(outcome)).split('What cannot')[0]
    exported = interchange.load(out / 'export' / 'suspect.safetensors')
    assert exported.architecture.name == 'mnist_cnn' and exported.architecture.flat_side == 2
    names = sorted(path.name for path in (out / 'export').iterdir())
    assert names == ['ft.json', 'ft.md', 'ft.safetensors', 'suspect.safetensors']
    wrong = [*SHORT, '--config.model.name=resnet34']
    assert_one_sentence(*run_here(arguments(tmp_path / 'other', run, f'npz:{clean}', *wrong), capsys), 'mnist_cnn')
    again = arguments(tmp_path / 'other', out, f'npz:{clean}', *SHORT)
    assert_one_sentence(*run_here(again, capsys), 'purified the given model')


@pytest.mark.parametrize(
    ('name', 'expected'), [('preact_resnet34', ('preact_resnet', 34)), ('vgg11_bn', ('vgg_bn', 11))]
)
def test_resolve_splits_names_with_a_depth(name, expected):
    config = purify.get_config()
    config.init_from = 'mine.pt'
    config.dataset = 'mnist5k'
    config.model.name = name
    validation.validate(config)
    resolved = resolve(config)
    assert (resolved.model.name, resolved.model.depth) == expected
    assert '--config=configs/purify.py' in sys.modules['configs.purify'].__doc__
