"""How a given model is fed: order of the classes and channels, sizes, few images, and outputs of its original code."""

import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from aft_jax import data
from aft_jax.config import default_config
from aft_jax.data.class_order import class_order
from aft_jax.data.dataset import Dataset
from aft_jax.errors import UserError
from aft_jax.pipeline import given_model, normalisation
from aft_jax.pipeline.assumptions import assumptions
from aft_jax.pipeline.given_model import FromFile, GivenModel
from aft_jax.pipeline.reference_outputs import check_reference_outputs
from aft_jax.runtime.sharding import make_mesh

FOLDERS = ['1', '10', '2']


def test_class_order_of_folders_and_numbers():
    assert class_order(FOLDERS, '') == ('1', '10', '2')
    assert class_order(FOLDERS, 'numeric') == ('1', '2', '10')
    with pytest.raises(UserError, match="the folder 'cat' is no number"):
        class_order(['1', 'cat'], 'numeric')


@pytest.mark.parametrize(
    'name, content, expected',
    [
        ('classes.txt', '2\n10\n1\nnone\n', ('2', '10', '1', 'none')),
        ('classes.json', '["2", "10", "1"]', ('2', '10', '1')),
        ('classes.json', '{"1": 2, "2": 0, "10": 1}', ('2', '10', '1')),
        ('classes.json', '{"1": 3, "2": 0, "10": 1}', 'indices 0, 1, 2'),
        ('classes.json', '{"1": ', 'cannot be read'),
        ('classes.json', '[1, 2]', 'names of two classes'),
        ('classes.txt', '1\n2\n', "lacks the folder '10'"),
        ('classes.txt', '1\n2\n10\n2\n', 'has a class twice'),
    ],
)
def test_class_order_of_a_file(name, content, expected, tmp_path):
    (tmp_path / name).write_text(content)
    if isinstance(expected, tuple):
        assert class_order(FOLDERS, str(tmp_path / name)) == expected
    else:
        with pytest.raises(UserError, match=expected):
            class_order(FOLDERS, str(tmp_path / name))


def test_load_folder_with_a_file_of_classes_and_channels_in_the_opposite_order(tmp_path, caplog):
    for name, colour in (('cat', (9, 0, 1)), ('dog', (7, 0, 1))):
        (tmp_path / 'pictures' / name).mkdir(parents=True)
        for index in range(2):
            Image.new('RGB', (8, 6), colour).save(tmp_path / 'pictures' / name / f'{index}.png')
    (tmp_path / 'classes.json').write_text(json.dumps({'eel': 0, 'dog': 1, 'cat': 2}))
    plain = {'size': 0, 'pad': 0, 'rgb': False, 'bgr': True, 'test_share': 0.5}
    dataset = data.load(f'folder:{tmp_path}/pictures', ConfigDict(plain | {'classes': f'{tmp_path}/classes.json'}))
    assert dataset.class_names == ('eel', 'dog', 'cat') and dataset.train_labels.tolist() == [2, 1]
    assert dataset.train_images[0, 0, 0].tolist() == [1, 0, 9]
    assert 'no pictures of 1 classes: eel' in caplog.text


class Rule(nn.Module):
    """A network without weights: a colour decides the class. A wrong one is as sure as a right one."""

    order: tuple[int, ...]

    def __call__(self, images):
        return 20 * images.mean(axis=(1, 2))[:, jnp.array(self.order)]


@pytest.fixture
def colours():
    """600 images of 32x32; the brightest of three channels is the class, by the names '1', '10' and '2'."""
    labels = (np.arange(600) % 3).astype(np.int32)
    images = np.full((600, 4, 4, 3), 40, np.uint8)
    images[np.arange(600), :, :, labels] = 200
    return Dataset('mine', images[:300], labels[:300], images[300:], labels[300:], ('1', '10', '2'))


@pytest.mark.parametrize(
    'order, expected',
    [
        ((0, 1, 2), None),
        ((0, 2, 1), 'the classes in the order of their numbers .--config.data.classes=numeric. it gets 100.0 %'),
        ((2, 1, 0), 'the channels in the opposite order .--config.data.bgr=True. it gets 100.0 %'),
    ],
)
def test_check_normalisation_finds_another_order(order, expected, colours):
    config = default_config()
    config.init_from, config.model.mean, config.model.std = 'mine.pt', (0.0,), (1.0,)
    given = GivenModel({'params': {}, 'batch_stats': {}}, FromFile(object()))

    def check():
        return normalisation.check_normalisation(given, Rule(order), config, colours, make_mesh()).warning

    if expected is None:
        assert check() == ''
        return
    with pytest.raises(UserError, match=f'near chance; with {expected}'):  # a third of the answers is right
        check()


def test_check_normalisation_warns_of_a_model_that_is_surer_than_right(colours):
    config = default_config()
    config.init_from, config.model.mean, config.model.std = 'mine.pt', (0.0,), (1.0,)
    labels = colours.train_labels.copy()
    labels[:120] = (labels[:120] + np.arange(120) % 2 + 1) % 3  # another network: a part of its answers is wrong
    dataset = Dataset('mine', colours.train_images, labels, colours.train_images, labels, ('a', 'b', 'c'))
    given = GivenModel({'params': {}, 'batch_stats': {}}, FromFile(object()))
    warning = normalisation.check_normalisation(given, Rule((0, 1, 2)), config, dataset, make_mesh()).warning
    assert '% of 500 clean images right, but it is ' in warning and '% sure of its predictions' in warning


def test_check_reference_outputs(tmp_path, colours):
    config = default_config()
    config.init_from, config.init_logits = 'mine.pt', str(tmp_path / 'reference.npz')

    def check(order=(0, 1, 2), **arrays):
        np.savez(tmp_path / 'reference.npz', **arrays)
        check_reference_outputs({'params': {}}, Rule(order), config, colours.image_shape, make_mesh())

    images = colours.train_images[:10]
    logits = 20 * (images / 255).mean(axis=(1, 2))
    check(images=images, logits=logits)
    check(images=(images / 255).astype(np.float32), logits=logits + 1e-4)
    for mistake, arrays in {
        'is not the one of init_logits.* 6 of 10 predictions': {'order': (0, 2, 1), 'images': images, 'logits': logits},
        'not the one': {'images': images, 'logits': np.full_like(logits, np.nan)},
        'logits are .10, 2., and the network has .10, 3.': {'images': images, 'logits': logits[:, :2]},
        'images are uint8 .10, 4, 4.': {'images': images[..., 0], 'logits': logits},
        'with the arrays images and logits': {'images': images},
    }.items():
        with pytest.raises(UserError, match=mistake):
            check(**arrays)
    config.init_logits = str(tmp_path / 'none.npz')
    with pytest.raises(UserError, match='none.npz cannot be read'):
        check_reference_outputs({'params': {}}, Rule((0, 1, 2)), config, colours.image_shape, make_mesh())


def test_fit_batch_size(caplog):
    config = default_config()
    config.batch_size = 64
    assert given_model.fit_batch_size(config, 64, make_mesh()) is config and not caplog.text
    assert given_model.fit_batch_size(config, 50, make_mesh()).batch_size == 48  # of four devices
    assert 'batch_size=64 is larger than the 50 training images; it is 48 here' in caplog.text


def test_assumptions_names_what_the_weights_do_not_tell(colours):
    config = default_config()
    config.init_from, config.model.name, config.model.mean = 'mine.pt', 'resnet', (0.485, 0.456, 0.406)
    text = '\n'.join(assumptions(config, colours))
    for part in ('ReLU', '3x3 convolution, stride 1', '(x - (0.485, 0.456, 0.406)) / 0.25', 'red, green, blue', '4x4'):
        assert part in text
