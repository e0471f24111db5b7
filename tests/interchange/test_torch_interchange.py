"""Networks from torch: equal logits both ways, files restored bit for bit, pickles that must not run.

Needs torch; tests/torch_models.py defines the networks a second time.
"""

import argparse
import datetime
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax
import numpy as np
import pytest
from torch_state import MNIST_SHAPES, assert_same_state, mnist_state

from aft_jax import interchange
from aft_jax.errors import UserError
from aft_jax.interchange.state_file import read

torch = pytest.importorskip('torch')
from torch_models import CLASSES, MnistCNN, nchw, randomised  # noqa: E402

# (name, options of the torch network, options detected from its file). Narrow networks have every layer and are quick.
NETWORKS = {
    'preact18': ('preact_resnet', {'depth': 18, 'width': 64}, {'depth': 18, 'width': 64, 'final_norm': False}),
    'preact34': (
        'preact_resnet',
        {'depth': 34, 'width': 8, 'final_norm': True},
        {'depth': 34, 'width': 8, 'final_norm': True},
    ),
    'preact50': ('preact_resnet', {'depth': 50, 'width': 8}, {'depth': 50, 'width': 8, 'final_norm': False}),
    'resnet18': ('resnet', {'depth': 18, 'width': 8}, {'depth': 18, 'width': 8, 'stem': 'imagenet'}),
    'resnet18 kin': (
        'resnet',
        {'depth': 18, 'width': 8, 'stem': 'cifar', 'kin': True},
        {'depth': 18, 'width': 8, 'stem': 'cifar'},
    ),
    'resnet34': (
        'resnet',
        {'depth': 34, 'width': 8, 'stem': 'cifar', 'channels': 1},
        {'depth': 34, 'width': 8, 'stem': 'cifar'},
    ),
    'resnet50': ('resnet', {'depth': 50, 'width': 8}, {'depth': 50, 'width': 8, 'stem': 'imagenet'}),
    'vgg11': (
        'vgg_bn',
        {'depth': 11, 'width': 4, 'hidden': 12},
        {'depth': 11, 'width': 4, 'pool_size': 7, 'hidden': 12},
    ),
    **{
        f'vgg{depth}': (
            'vgg_bn',
            {'depth': depth, 'width': 4, 'hidden': 12, 'pool_size': size},
            {'depth': depth, 'width': 4, 'pool_size': size, 'hidden': 12},
        )
        for depth, size in ((13, 1), (16, 2), (19, 3))
    },
    'mnist': ('mnist_cnn', {}, {'conv_bias': False}),
    'mnist with biases': ('mnist_cnn', {'conv_bias': True}, {'conv_bias': True}),
}
# Sides of 72 pixels give vgg maps that its cells of 7, 3 or 2 pixels do not divide evenly: 72 / 32 rounds down to 2.
SIDES = {'mnist_cnn': 28, 'vgg_bn': 72}


@pytest.mark.parametrize('network', NETWORKS)
def test_load_and_save_keep_logits_and_bits(tmp_path, network):
    name, made_with, options = NETWORKS[network]
    model = randomised(name, num_classes=7, **made_with)
    path, out = tmp_path / 'in.pt', tmp_path / 'out.pt'
    torch.save(model.state_dict(), path)
    imported = interchange.load(path)
    assert imported.architecture.name == name
    assert imported.architecture.options == options
    assert imported.architecture.num_classes == 7

    interchange.save(out, imported.variables, imported)
    before, after = torch.load(path), torch.load(out)
    assert type(after) is type(before) is OrderedDict and list(after) == list(before)
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype and torch.equal(after[key], tensor)

    shape = (*2 * [SIDES.get(name, 32)], imported.architecture.channels)
    images = np.random.default_rng(1).random((2, *shape), np.float32)
    logits = jax.jit(imported.architecture.build().apply)
    with torch.no_grad():
        expected = model(nchw(images)).numpy()
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(logits(imported.variables, images), expected, rtol=0, atol=1e-4)
        # The way back, with weights that torch has not seen.
        factors = np.random.default_rng(2)
        moved = jax.tree.map(lambda leaf: leaf * factors.uniform(0.8, 1.2, leaf.shape).astype('f'), imported.variables)
        interchange.save(out, moved, imported)
        model.load_state_dict(torch.load(out))
        returned = model(nchw(images)).numpy()
        assert np.abs(returned - expected).max() > 1e-2
        np.testing.assert_allclose(returned, logits(moved, images), rtol=0, atol=1e-4)


def test_with_usual_names_exports_to_torch(tmp_path):
    architecture = interchange.Architecture('mnist_cnn', {'conv_bias': True}, 10, 1, 4)
    variables = architecture.build().init(jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))
    interchange.save(tmp_path / 'own.pth', variables, interchange.with_usual_names(architecture, variables))
    model = MnistCNN(conv_bias=True)
    model.load_state_dict(torch.load(tmp_path / 'own.pth'))  # strict: every key, counters as well
    images = np.random.default_rng(1).random((2, 28, 28, 1), np.float32)
    with torch.no_grad():
        expected = model.eval()(nchw(images)).numpy()
    np.testing.assert_allclose(architecture.build().apply(variables, images), expected, rtol=0, atol=1e-4)


def torch_state(dtype=torch.float32) -> OrderedDict:
    state = {key: torch.from_numpy(value) for key, value in mnist_state().items()}
    return OrderedDict((key, value if key.endswith('tracked') else value.to(dtype)) for key, value in state.items())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_save_restores_dtypes_of_torch(tmp_path, dtype):
    torch.save(torch_state(dtype), tmp_path / 'in.pt')
    imported = interchange.load(tmp_path / 'in.pt')
    interchange.save(tmp_path / 'out.pt', imported.variables, imported)
    interchange.save(tmp_path / 'out.safetensors', imported.variables, imported)
    for key, tensor in torch.load(tmp_path / 'out.pt').items():
        assert tensor.dtype == torch_state(dtype)[key].dtype and torch.equal(tensor, torch_state(dtype)[key])
    in_torch, in_safetensors = read(tmp_path / 'out.pt').tensors, read(tmp_path / 'out.safetensors').tensors
    assert_same_state(dict(sorted(in_safetensors.items())), dict(sorted(in_torch.items())))


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('wrapper', ['model', 'netC', 'state_dict'])
def test_load_wrappers(tmp_path, wrapper, legacy):
    """WaNet's release stores several networks and the state of an optimiser in one file."""
    state = OrderedDict((f'module.{key}', value) for key, value in torch_state().items())
    whole = {wrapper: state, 'netG': OrderedDict(x=torch.zeros(3)), 'optimizerC': {'state': {}, 'param_groups': [{}]}}
    path = tmp_path / 'mnist_all2one.pth.tar'
    torch.save(whole, path, _use_new_zipfile_serialization=not legacy)
    imported = interchange.load(path)
    assert imported.source.wrapper == wrapper
    interchange.save(tmp_path / 'out.pth.tar', imported.variables, imported)
    back = torch.load(tmp_path / 'out.pth.tar')
    assert list(back) == [wrapper] and list(back[wrapper]) == list(state)


@pytest.mark.parametrize(
    'wrap, place',
    [
        (lambda state: {'model': {'state_dict': state}, 'epoch': 3}, 'model/state_dict'),
        (lambda state: {'weights': state}, 'weights'),
        (lambda state: {'optimizer': {'state': {'a': torch.zeros(3)}}, 'network': state}, 'network'),
        (lambda state: {'net': {name: tensor.numpy() for name, tensor in state.items()}}, 'net'),
        (lambda state: {'scalars': {'lr': torch.tensor(0.1)}, 'ours': state}, 'ours'),
        (
            lambda state: {
                'state_dict': state,
                'args': argparse.Namespace(lr=0.1, out=Path('runs')),
                'when': datetime.datetime(2026, 11, 28),
                'best': np.float64(0.5),
            },
            'state_dict',
        ),
    ],
    ids=['nested', 'weights', 'beside an optimiser', 'arrays', 'the largest', 'arguments of a script'],
)
def test_load_finds_the_state_dict(tmp_path, wrap, place):
    state = torch_state()
    torch.save(wrap(state), tmp_path / 'last.ckpt')
    imported = interchange.load(tmp_path / 'last.ckpt')
    assert imported.source.wrapper == place
    interchange.save(tmp_path / 'out.ckpt', imported.variables, imported)
    back = torch.load(tmp_path / 'out.ckpt')
    for key in place.split('/'):
        back = back[key]
    assert list(back) == list(state) and all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_load_attack_result_of_backdoorbench(tmp_path):
    """NumPy arrays and scalars beside the weights are dropped; the fields about the network stay."""
    whole = {
        'model_name': 'mnist_cnn',
        'num_classes': 10,
        'model': torch_state(),
        'img_size': [28, 28, 1],
        'clean_data': 'mnist',
        'bd_train': {'x': torch.zeros(3), 'original_index': np.arange(5), 'names': np.array(['a', None], object)},
        'bd_test': {'indicator': np.zeros((2, 3), np.int8), 'scalar': np.float64(0.5)},
    }
    path = tmp_path / 'attack_result.pt'
    torch.save(whole, path)
    imported = interchange.load(path)
    interchange.save(tmp_path / 'out.pt', imported.variables, imported)
    back = torch.load(tmp_path / 'out.pt')
    assert {key: value for key, value in back.items() if key != 'model'} == {
        key: whole[key] for key in ('model_name', 'num_classes', 'img_size', 'clean_data')
    }
    assert all(torch.equal(back['model'][key], tensor) for key, tensor in whole['model'].items())


class Trap:
    """Creates a file when a pickle with it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class NumpyTrap(Trap):
    """The same behind a name for which the loader has a placeholder."""

    def __reduce__(self):
        return np.ndarray, (Trap(self.path),)


@pytest.mark.parametrize('trap', [Trap, NumpyTrap])
@pytest.mark.parametrize('form', ['zip', 'legacy', 'bare pickle', 'inside the weights'])
def test_load_rejects_a_malicious_pickle(tmp_path, trap, form):
    path, created = tmp_path / 'evil.pt', tmp_path / 'created'
    content = {'model': torch_state(), 'more': trap(created)}
    match form:
        case 'bare pickle':
            path.write_bytes(pickle.dumps(trap(created)))
        case 'inside the weights':
            torch.save(torch_state() | {'conv1.weight': trap(created)}, path)
        case _:
            torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')
    with pytest.raises(UserError) as caught:
        interchange.load(path)
    text = str(caught.value)
    assert text.startswith(f'{path} holds more than tensors') and text.endswith('.') and '\n' not in text
    assert not created.exists()
    # An unrestricted loader does run the trap.
    if form == 'bare pickle' and trap is Trap:
        pickle.loads(path.read_bytes())
        assert created.exists()


def test_load_ignores_torchs_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    torch.save({'model': Trap(tmp_path / 'created')}, tmp_path / 'evil.pt')
    with pytest.raises(UserError, match='holds more than tensors'):
        interchange.load(tmp_path / 'evil.pt')
    assert not (tmp_path / 'created').exists()


def test_load_rejects_a_whole_module(tmp_path):
    torch.save(CLASSES['mnist_cnn'](), tmp_path / 'module.pt')
    with pytest.raises(
        UserError, match=r'holds more than tensors \(benchmarks.torch_networks.MnistCNN\).*save model.state_dict\(\)'
    ):
        interchange.load(tmp_path / 'module.pt')


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ('short', 'damaged, cut short, or not a file of PyTorch'),
        ('legacy short', 'damaged, cut short, or not a file of PyTorch'),
        ('text', 'damaged, cut short, or not a file of PyTorch'),
        ('zip', 'damaged, cut short, or not a file of PyTorch'),
        ('list', 'holds no state dict'),
        ('numbers', 'holds no state dict'),
        ('sparse', 'conv1.weight of .* is not a plain tensor'),
    ],
)
def test_load_faults_of_a_torch_file(tmp_path, content, expected):
    path = tmp_path / 'net.pt'
    match content:
        case 'short' | 'legacy short':
            torch.save(torch_state(), path, _use_new_zipfile_serialization=content == 'short')
            path.write_bytes(path.read_bytes()[:-5000])
        case 'text':
            path.write_text('this is no model')
        case 'zip':
            with zipfile.ZipFile(path, 'w') as file:
                file.writestr('readme.txt', 'this is no model')
        case 'list':
            torch.save([torch.zeros(3)], path)
        case 'numbers':
            torch.save({'model': {'epoch': 3}, 'lr': 0.1}, path)
        case 'sparse':
            torch.save(torch_state() | {'conv1.weight': torch.zeros(32, 9).to_sparse()}, path)
    with pytest.raises(UserError, match=expected) as caught:
        interchange.load(path)
    assert '\n' not in str(caught.value)


def test_load_lists_missing_keys_of_a_torch_file(tmp_path):
    state = torch_state()
    del state['linear6.bias']
    torch.save({'model': state}, tmp_path / 'net.pt')
    assert len(state) == len(MNIST_SHAPES) - 1
    with pytest.raises(UserError, match=r'nearest to mnist_cnn \(conv_bias=False\), but lacks 1 key \(linear6.bias\)'):
        interchange.load(tmp_path / 'net.pt')
