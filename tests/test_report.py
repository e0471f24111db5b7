"""The pictures of a run, those in TensorBoard, and the progress on the terminal."""

import io
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from aft_jax.analysis.observation import Observation
from aft_jax.errors import UserError
from aft_jax.report import before_after, experiment_report, requirements, trigger_gallery
from aft_jax.training import metrics
from aft_jax.training.metrics import Progress


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
    before_after.write_before_after(
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
    np.testing.assert_array_equal(before_after.choose(labels, np.zeros(3, int), 8), [3, 2])
    np.testing.assert_array_equal(before_after.choose(labels, None, 2), [0, 3])


def test_without_matplotlib(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(UserError, match=r'aft_jax\[report\]'):
        requirements.check_available()


def test_the_difference_is_magnified_about_grey():
    clean = np.array([[[100], [0]], [[10], [255]]], np.uint8)
    triggered = np.array([[[110], [0]], [[0], [0]]], np.uint8)
    np.testing.assert_array_equal(trigger_gallery.magnified_difference(clean, triggered)[..., 0], [[178, 128], [78, 0]])


def test_the_gallery_shows_every_attack(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 1), np.uint8)
    for attacks in (('sig',), ('sig', 'blend', 'badnets')):
        trigger_gallery.write_gallery(
            tmp_path / f'{len(attacks)}.png', {name: (images, 255 - images) for name in attacks}
        )
    with Image.open(tmp_path / '1.png') as one, Image.open(tmp_path / '3.png') as three:
        assert three.width == one.width and three.height > 2 * one.height


def events(directory):
    """What stands in the TensorBoard files of a directory: each a length, its checksum, the event and its checksum."""
    for path in sorted(directory.rglob('events*')):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack('<Q', content[place : place + 8])
            yield Event.FromString(content[place + 12 : place + 12 + length])
            place += length + 16


def test_the_pictures_are_in_tensorboard(tmp_path, make_run):
    run, before = make_run(), set(sys.modules)
    images = np.random.default_rng(0).integers(0, 256, (3, 9, 9, 1), np.uint8)
    trigger_gallery.write_gallery(tmp_path / 'triggers.png', {'sig': (images, 255 - images)})
    kinds = {'clean': images, 'adversarial': 255 - images}
    labels = np.array([0, 1, 2], np.int32)
    seen = Observation(labels, None, 0.1, kinds, {}, {}, (), {}, None)
    experiment_report.show_in_tensorboard(run, tmp_path, seen)
    run.writer.close()
    assert 'tensorflow' not in set(sys.modules) - before
    found = {}
    for event in events(run.workdir / 'tensorboard' / 'report'):
        for value in event.summary.value:
            found[value.tag] = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))
    assert found.keys() == {'triggers', 'clean_adversarial'}
    np.testing.assert_array_equal(found['triggers'], trigger_gallery.read(tmp_path / 'triggers.png'))
    # Two rows of three images, each pixel 8 x 8, with white between them.
    mosaic = found['clean_adversarial'][..., 0]
    assert mosaic.shape == (2 * 72 + 4, 3 * 72 + 2 * 4)
    for row, kind in enumerate(kinds.values()):
        for column in range(3):
            cell = mosaic[76 * row :][:72, 76 * column :][:, :72]
            np.testing.assert_array_equal(cell, np.kron(kind[column, ..., 0], np.ones((8, 8), np.uint8)))
    assert (mosaic[72:76] == 255).all() and (mosaic[:, 72:76] == 255).all()


class Terminal(io.StringIO):
    """A terminal of 90 columns."""

    def isatty(self):
        return True


@pytest.mark.parametrize('stream', [Terminal, io.StringIO])
def test_the_time_left_is_shown(stream, monkeypatch):
    """Resumed at step 100 of 1000: a hundred steps have taken ten seconds, so the other 800 take 80."""
    shown, clock = stream(), [1000.0]
    monkeypatch.setattr(sys, 'stderr', shown)
    monkeypatch.setattr(metrics, 'time', SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setenv('COLUMNS', '90')
    monkeypatch.setattr('tqdm.std.time', lambda: clock[0])
    with Progress('purify/aft', 100, 1000, batch_size=128) as progress:
        clock[0] += 10
        progress.show(200, {'loss': 0.25})
    line = shown.getvalue().replace('\r', '\n').strip().splitlines()[-1]
    assert 'purify/aft' in line and '01:20 left' in line and 'loss 0.2500, 1,280 images/s' in line
    assert ('200/1000 |' if stream is Terminal else 'step 200 of 1000') in line
