"""The picture of a run."""

import numpy as np
import pytest
from PIL import Image

from aft_jax.errors import UserError
from aft_jax.report import gallery, pictures


def scores(acc, asr):
    return {'acc': acc, 'asr': asr, 'ra': None}


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('attacked', [True, False])
def test_the_picture_is_drawn(tmp_path, channels, attacked):
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 9, channels), np.uint8)
    labels = np.array([1, 2], np.int32)
    rows = {'clean': images} | ({'triggered': 255 - images} if attacked else {})
    attack = 'sig' if attacked else 'none'
    outcome = {'dataset': 'tiny', 'attack': attack, 'label_mode': 'all2one', 'infected': scores(0.9, 1.0)}
    outcome['purified'] = {'aft': scores(0.8, 0.1)}
    pictures.write_before_after(
        tmp_path / 'report' / 'picture.png',
        rows,
        labels,
        np.zeros(3, np.int32) if attacked else None,
        ('zero', 'one', 'two'),
        {name: dict.fromkeys(rows, labels) for name in ('infected', 'aft')},
        outcome,
    )
    with Image.open(tmp_path / 'report' / 'picture.png') as picture:
        assert picture.width > 1000 and np.asarray(picture.convert('L')).std() > 10


def test_one_image_a_class_that_the_trigger_would_change():
    labels = np.array([0, 0, 2, 1, 2, 1])
    np.testing.assert_array_equal(pictures.choose(labels, np.zeros(3, int), 8), [3, 2])
    np.testing.assert_array_equal(pictures.choose(labels, None, 2), [0, 3])


def test_without_matplotlib(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(UserError, match=r'aft_jax\[report\]'):
        pictures.check_available()


def test_the_difference_is_magnified_about_grey():
    clean = np.array([[[100], [0]], [[10], [255]]], np.uint8)
    triggered = np.array([[[110], [0]], [[0], [0]]], np.uint8)
    np.testing.assert_array_equal(gallery.magnified_difference(clean, triggered)[..., 0], [[178, 128], [78, 0]])


def test_the_gallery_shows_every_attack(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 1), np.uint8)
    for attacks in (('sig',), ('sig', 'blend', 'badnets')):
        gallery.write_gallery(tmp_path / f'{len(attacks)}.png', {name: (images, 255 - images) for name in attacks})
    with Image.open(tmp_path / '1.png') as one, Image.open(tmp_path / '3.png') as three:
        assert three.width == one.width and three.height > 2 * one.height
