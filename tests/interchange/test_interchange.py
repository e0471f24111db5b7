"""Files of tensors without torch: names, prefixes, mapping files, dtypes, and all faults."""

import json
import os
import re
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from torch_state import COUNT, MNIST_SHAPES, assert_same_state, mnist_state

from aft_jax import interchange
from aft_jax.errors import UserError
from aft_jax.interchange.architecture import Architecture, check_data, check_model
from aft_jax.interchange.card import write_card
from aft_jax.interchange.convert import BFLOAT16
from aft_jax.interchange.file_kind import check_folder
from aft_jax.interchange.state_file import checksum, read
from aft_jax.interchange.torch_names import namings

MNIST = Architecture('mnist_cnn', {'conv_bias': False}, 10, 1, 4)


def write(path: Path, state: dict, metadata=None) -> Path:
    safetensors.numpy.save_file(state, path, metadata)
    return path


def sentence(call, *arguments) -> str:
    """Calls a function and returns the message of its UserError, which is one sentence."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert text.endswith('.') or text.endswith("'") and '\n' not in text
    return text


@pytest.fixture
def stored(tmp_path) -> Path:
    return write(tmp_path / 'net.safetensors', mnist_state())


def changed(tmp_path: Path, **changes) -> Path:
    """Writes a file of the MNIST network with some tensors changed, or removed where the change is None."""
    state = mnist_state() | {key.replace('__', '.'): value for key, value in changes.items()}
    return write(tmp_path / 'changed.safetensors', {key: value for key, value in state.items() if value is not None})


def test_load_permutes_each_kind_of_tensor(stored):
    imported = interchange.load(stored)
    assert imported.architecture == MNIST
    state, params, stats = mnist_state(), imported.variables['params'], imported.variables['batch_stats']
    # [out, in, h, w] at (5, 1, 2, 0), and [out, in] at (3, 7).
    assert params['Conv_1']['kernel'][2, 0, 1, 5] == state['layer2.conv1.weight'][5, 1, 2, 0]
    assert params['Dense_1']['kernel'][7, 3] == state['linear9.weight'][3, 7]
    # Input 2 * 16 + 3 * 4 + 1 is channel 2, row 3, column 1 to torch; to Flax that is (3 * 4 + 1) * 64 + 2.
    assert params['Dense_0']['kernel'][(3 * 4 + 1) * 64 + 2, 9] == state['linear6.weight'][9, 2 * 16 + 3 * 4 + 1]
    np.testing.assert_array_equal(params['BatchNorm_1']['scale'], state['layer3.bn1.weight'])
    np.testing.assert_array_equal(stats['BatchNorm_0']['var'], state['layer2.bn1.running_var'])
    assert {leaf.dtype for leaf in jax.tree.leaves(imported.variables)} == {np.dtype(np.float32)}


@pytest.mark.parametrize('prefix', ['', 'module.', 'netC.', 'module.netC.', '1.'])
def test_save_restores_prefixes(tmp_path, prefix):
    state = mnist_state(prefix)
    metadata = {'format': 'pt', 'made by': 'a stranger'}
    imported = interchange.load(write(tmp_path / 'in.safetensors', state, metadata))
    assert imported.architecture == MNIST
    interchange.save(tmp_path / 'out.safetensors', imported.variables, imported)
    back = read(tmp_path / 'out.safetensors')
    assert back.notes == metadata
    assert_same_state(back.tensors, imported.source.tensors)
    assert {key: value.tobytes() for key, value in back.tensors.items()} == {k: v.tobytes() for k, v in state.items()}
    assert back.tensors[f'{prefix}layer2.bn1.num_batches_tracked'] == COUNT


@pytest.mark.parametrize('dtype', [np.float16, BFLOAT16, np.float64])
def test_save_restores_dtypes(tmp_path, dtype):
    """Half precision is exact in float32; double precision is rounded to float32."""
    state = mnist_state(dtype=dtype)
    imported = interchange.load(write(tmp_path / 'in.safetensors', state))
    interchange.save(tmp_path / 'out.safetensors', imported.variables, imported)
    back = read(tmp_path / 'out.safetensors').tensors
    for key, array in state.items():
        expected = array if key.endswith('tracked') else array.astype(np.float32).astype(dtype)
        assert back[key].dtype == array.dtype
        np.testing.assert_array_equal(back[key], expected)


def test_save_writes_the_trained_values(tmp_path, stored):
    imported = interchange.load(stored)
    purified = jax.tree.map(lambda leaf: leaf + np.float32(1), imported.variables)
    interchange.save(tmp_path / 'out.safetensors', purified, imported)
    before, after = read(stored).tensors, read(tmp_path / 'out.safetensors').tensors
    for key in MNIST_SHAPES:
        np.testing.assert_array_equal(after[key], before[key] + (0 if key.endswith('tracked') else np.float32(1)))


def test_save_rejects_faults(tmp_path, stored):
    imported, out = interchange.load(stored), tmp_path / 'out.safetensors'
    broken = jax.tree.map(np.copy, imported.variables)
    broken['params']['Dense_1']['bias'][0] = np.nan
    assert 'params/Dense_1/bias has values that are not finite' in sentence(interchange.save, out, broken, imported)
    half = interchange.load(write(tmp_path / 'half.safetensors', mnist_state(dtype=np.float16)))
    large = jax.tree.map(lambda leaf: leaf + np.float32(1e5), half.variables)
    assert 'not finite in float16' in sentence(interchange.save, out, large, half)
    assert 'is the file that the model came from' in sentence(interchange.save, stored, imported.variables, imported)
    nowhere = tmp_path / 'nowhere' / 'out.safetensors'
    assert 'cannot be written (No such file' in sentence(interchange.save, nowhere, imported.variables, imported)
    assert not out.exists()
    with pytest.raises(ValueError, match='not variables of mnist_cnn'):
        interchange.save(out, {'params': imported.variables['params']}, imported)


def test_load_mapping_renames_and_ignores_keys(tmp_path):
    state = mnist_state('net.')
    state['first.w'] = state.pop('net.conv1.weight')
    state['mean'] = np.zeros((1, 1, 1, 1), np.float32)
    path, mapping = write(tmp_path / 'odd.safetensors', state), tmp_path / 'names.json'
    assert 'has 2 keys (first.w, mean) too many' in sentence(interchange.load, path)
    mapping.write_text(json.dumps({'first.w': 'params/Conv_0/kernel', 'mean': None}))
    imported = interchange.load(path, mapping)
    np.testing.assert_array_equal(imported.variables['params']['Conv_0']['kernel'][:, :, 0, 4], state['first.w'][4, 0])
    interchange.save(tmp_path / 'out.safetensors', imported.variables, imported)
    assert_same_state(read(tmp_path / 'out.safetensors').tensors, read(path).tensors)


@pytest.mark.parametrize('name', ['resnet', 'preact_resnet', 'vgg_bn', 'mnist_cnn'])
def test_match_with_a_mapping_of_every_key(tmp_path, name):
    """A state dict of meaningless names is recognised by the mapped paths alone."""
    naming = [naming for naming in namings() if naming.name == name][-1]
    mapping = {f'tensor{i}': path for i, path in enumerate(naming.paths.values())}
    match = interchange.match(mapping, mapping, 'it')
    assert not match.missing and not match.extra
    assert match.naming.name == name and set(match.naming.paths.values()) == set(mapping.values())


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ('{', 'is not JSON'),
        ('[1]', 'should be an object of keys and paths'),
        ('{"conv1.weight": 3}', 'should be an object of keys and paths'),
        ('{"conv1.wait": null}', "names 'conv1.wait', which is not in .*. The nearest is 'conv1.weight'"),
        ('{"conv1.weight": "params/Conv_0/kernl"}', "'params/Conv_0/kernl', which no network has. The nearest is"),
        (
            '{"conv1.weight": "params/stem/kernel", "conv1.bias": "params/Dense_0/bias"}',
            'mixes paths of different networks',
        ),
        ('{"conv1.weight": "params/stem/kernel", "conv1.bias": "params/stem/kernel"}', 'the same path to two keys'),
    ],
)
def test_load_faults_of_a_mapping_file(tmp_path, stored, content, expected):
    mapping = tmp_path / 'names.json'
    mapping.write_text(content)
    with pytest.raises(UserError, match=expected):
        interchange.load(stored, mapping)


def test_load_missing_mapping_file(tmp_path, stored):
    assert 'names.json cannot be read (No such file' in sentence(interchange.load, stored, tmp_path / 'names.json')


FOUR_BY_FOUR = np.zeros((32, 1, 4, 4), np.float32)


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        (
            {'layer2.conv1.weight': None, 'layer2.conv.weight': np.zeros((64, 32, 3, 3), np.float32)},
            'lacks 1 key (layer2.conv1.weight (nearest: layer2.conv.weight)) and '
            'has 1 key (layer2.conv.weight (nearest: layer2.conv1.weight)) too many',
        ),
        ({'linear9.bias': None}, 'lacks 1 key (linear9.bias);'),
        ({'netG.x': np.zeros(3, np.float32)}, 'has 1 key (netG.x) too many'),
        ({'conv1.weight': FOUR_BY_FOUR}, 'conv1.weight (32, 1, 4, 4) instead of (32, 1, 3, 3)'),
        ({'conv1.weight': np.zeros(3, np.float32)}, 'but not its shapes: conv1.weight (3)'),
        ({'linear6.weight': np.zeros((512, 1000), np.float32)}, 'linear6.weight (512, 1000) instead of (512, 576)'),
        ({'linear9.weight': np.zeros((0, 512), np.float32)}, 'but not its shapes'),
        ({'conv1.bias': np.full(32, np.nan, np.float32)}, 'conv1.bias of FILE has values that are not finite'),
        ({'conv1.bias': np.full(32, 1e300)}, 'conv1.bias of FILE has values that are not finite'),
        ({'conv1.bias': np.zeros(32, np.int8)}, 'conv1.bias of FILE is of int8'),
        ({'layer2.bn1.running_var': np.full(32, -1, np.float32)}, 'running_var of FILE has negative variances'),
    ],
)
def test_load_faults_of_tensors(tmp_path, changes, expected):
    path = changed(tmp_path, **changes)
    assert expected in sentence(interchange.load, path).replace(str(path), 'FILE')


def test_load_shortens_a_long_list_of_keys(tmp_path):
    keys = [f'zzz{i:02}' for i in range(20)]
    text = sentence(interchange.load, changed(tmp_path, **{key: np.zeros(1, np.float32) for key in keys}))
    assert 'has 20 keys (zzz00, ' in text and 'zzz07 and 12 more) too many' in text and 'zzz08' not in text


def test_load_judges_a_file_by_its_content(tmp_path):
    path = write(tmp_path / 'pytorch_model.bin', mnist_state())
    imported = interchange.load(path)
    interchange.save(tmp_path / 'out.bin', imported.variables, imported)
    assert_same_state(read(tmp_path / 'out.bin').tensors, read(path).tensors)


@pytest.mark.parametrize(
    'content, expected',
    [
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:00', 'a pointer of Git LFS.*git lfs pull'),
        (b'\n<!DOCTYPE html><html>', 'a web page'),
        (b'\x89HDF\r\n\x1a\n' + bytes(20), 'an HDF5 file, as Keras writes it'),
        (b'\x08\x07\x12\x07pytorch\x1a', 'an ONNX model'),
        ({'net/code/__torch__.py': '', 'net/data.pkl': ''}, 'a TorchScript archive'),
        ({'config.json': '{}', 'metadata.json': '{}', 'model.weights.h5': ''}, 'a Keras archive'),
    ],
)
def test_load_says_what_another_kind_of_file_is(tmp_path, content, expected):
    path = tmp_path / 'net.pth'
    if isinstance(content, dict):
        with zipfile.ZipFile(path, 'w') as file:
            for name, text in content.items():
                file.writestr(name, text)
    else:
        path.write_bytes(content)
    assert re.search(f'{path} is {expected}', sentence(interchange.load, path))


def test_check_folder_says_what_another_kind_of_folder_is(tmp_path):
    check_folder(tmp_path)
    (tmp_path / 'config.json').write_text('{"data_checksum": 3}')
    check_folder(tmp_path)
    (tmp_path / 'config.json').write_text('{"model_type": "resnet", "architectures": []}')
    (tmp_path / 'model.safetensors').touch()
    assert f'name its file of weights, init_from={tmp_path}/model.safetensors' in sentence(check_folder, tmp_path)
    (tmp_path / 'saved_model.pb').touch()
    assert 'is a SavedModel of TensorFlow' in sentence(check_folder, tmp_path)


@pytest.mark.parametrize(
    'prefix, others',
    [
        ('', ('n_averaged', 'criterion.weight', 'layer2.conv1.total_ops', 'mean', 'std')),
        ('module.', ('n_averaged',)),
        ('student.', ('teacher.conv1.weight', 'teacher.linear9.bias')),
    ],
)
def test_load_leaves_tensors_beside_the_network_aside(tmp_path, caplog, prefix, others):
    state = mnist_state(prefix) | {name: np.ones(10, np.float32) for name in others}
    path = write(tmp_path / 'net.safetensors', state)
    imported = interchange.load(path)
    assert imported.architecture == MNIST
    assert f'{len(others)} tensors are no part of the network' in caplog.text and others[0] in caplog.text
    interchange.save(tmp_path / 'out.safetensors', imported.variables, imported)
    assert_same_state(read(tmp_path / 'out.safetensors').tensors, read(path).tensors)


def test_load_unknown_network(tmp_path):
    state = {f'blocks.{i}.attention.weight': np.zeros((2, 2), np.float32) for i in range(12)}
    text = sentence(interchange.load, write(tmp_path / 'vit.safetensors', state))
    assert (
        "holds none of the known networks (mnist_cnn, preact_resnet, resnet, vgg_bn): it has 12 keys, such as 'blo"
        in text
    )


def test_load_faults_of_a_file(tmp_path, stored):
    empty, short, text = (tmp_path / f'{name}.safetensors' for name in ('empty', 'short', 'text'))
    empty.touch()
    short.write_bytes(stored.read_bytes()[:-1000])
    text.write_text('{"this": "is a text"}')
    assert f'{empty} is empty' in sentence(interchange.load, empty)
    for path in (short, text):
        assert f'{path} cannot be read as .safetensors: it is damaged' in sentence(interchange.load, path)
    nothing = write(tmp_path / 'nothing.safetensors', {})
    assert 'holds no tensors' in sentence(interchange.load, nothing)
    folder = tmp_path / 'folder.pt'
    folder.mkdir()
    assert f'{folder} is a directory' in sentence(interchange.load, folder)
    assert 'cannot be read (No such file or directory)' in sentence(interchange.load, tmp_path / 'absent.pt')
    secret = write(tmp_path / 'secret.safetensors', mnist_state())
    secret.chmod(0)
    if not os.access(secret, os.R_OK):  # root may read everything
        assert 'cannot be read (Permission denied)' in sentence(interchange.load, secret)


@pytest.mark.parametrize(
    ('library', 'module', 'suffix', 'expected'),
    [
        ('torch', 'torch_file', '.pt', 'needs PyTorch; pip install torch'),
        ('safetensors', 'safetensors_file', '.safetensors', r'pip install .aft_jax\[interchange\]'),
    ],
)
def test_load_without_the_library(tmp_path, monkeypatch, library, module, suffix, expected):
    path = tmp_path / f'net{suffix}'
    path.write_bytes(b'something')
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f'aft_jax.interchange.{module}', raising=False)
    monkeypatch.delattr(interchange, module, raising=False)
    with pytest.raises(UserError, match=expected):
        interchange.load(path)


def test_check_model(config):
    resnet = Architecture('resnet', {'depth': 34, 'width': 64, 'stem': 'cifar'}, 10, 3, 0)
    text = sentence(check_model, resnet, config.model, 'net.pt')
    assert text == 'net.pt holds a network of model.name=resnet, but the config says model.name=mnist_cnn.'
    config.model.name, config.model.depth = 'resnet', 18
    text = sentence(check_model, resnet, config.model, 'net.pt')
    assert text == 'net.pt holds a network of model.depth=34, but the config says model.depth=18.'
    config.model.depth = 34
    check_model(resnet, config.model, 'net.pt')


def test_check_data():
    check_data(MNIST, 10, (28, 28, 1), 'net.pt')
    check_data(MNIST, 10, (25, 32, 1), 'net.pt')
    assert 'has 10 classes, but the data have 43' in sentence(check_data, MNIST, 43, (28, 28, 1), 'net.pt')
    assert 'images of 1 channels, but the data have 3' in sentence(check_data, MNIST, 10, (28, 28, 3), 'net.pt')
    assert '25 to 32 pixels per side, but the images of the data are 28x33' in sentence(
        check_data, MNIST, 10, (28, 33, 1), 'net.pt'
    )


def test_write_card(tmp_path, stored):
    after = write(tmp_path / 'after.safetensors', mnist_state(dtype=np.float16))
    facts = {
        'title': 'Purified | network',
        'defense': 'aft',
        'seed': 7,
        'data': {'name': 'mnist5k', 'clean images': 250},
        'figures': {'acc': {'before': 0.98, 'after': 0.9712345678}, 'hypothesis': {'before': 0.9}},
    }
    as_json, as_markdown = write_card(tmp_path / 'card', facts, stored, after)
    assert (as_json.name, as_markdown.name) == ('card.json', 'card.md')
    card = json.loads(as_json.read_text())
    assert {name: card[name] for name in facts} == facts
    # The published SHA-256 of 'abc'.
    (tmp_path / 'abc').write_text('abc')
    assert checksum(tmp_path / 'abc') == 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'
    assert card['files'] == {
        'before': {'name': 'net.safetensors', 'sha256': checksum(stored)},
        'after': {'name': 'after.safetensors', 'sha256': checksum(after)},
    }
    lines = as_markdown.read_text().splitlines()
    assert lines[0] == '# Purified \\| network'
    for line in ('- seed: 7', '## Data', '- clean images: 250', '|  | before | after |', '| hypothesis | 0.9 |  |'):
        assert line in lines
    assert '| acc | 0.98 | 0.971235 |' in lines
    assert f'| before | net.safetensors | {checksum(stored)} |' in lines
    missing = tmp_path / 'missing.pt'
    assert f'{missing}: No such file' in sentence(write_card, tmp_path / 'card', facts, stored, missing)
