"""The pictures of a run as files and in TensorBoard, and the progress on the terminal."""

import io
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from experiment_results import results, scores
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from aft_jax.analysis.observation import Observation
from aft_jax.errors import UserError
from aft_jax.report import before_after, experiment_report, relapse_figure, requirements, score_bars, trigger_gallery
from aft_jax.results.aggregate import Group, Spread
from aft_jax.results.workdir import RunFiles
from aft_jax.training import metrics
from aft_jax.training.metrics import Progress


def drawn_bars(figure):
    """Returns the numbers at the ends of the bars of before_after.png by score, and the names of the models."""
    axis = figure.subfigs[1].axes[0]
    names = [container.get_label() for container in axis.containers]
    numbers = [float(text.get_text()) for text in axis.texts]
    count = len(axis.get_yticklabels())
    values = {name: numbers[i * count : (i + 1) * count] for i, name in enumerate(names)}
    widths = {c.get_label(): [pytest.approx(bar.get_width(), abs=0.05) for bar in c] for c in axis.containers}
    assert values == widths
    return values, [label.get_text() for label in axis.get_yticklabels()]


@pytest.mark.parametrize(('channels', 'attack'), [(1, 'sig'), (3, 'none')])
def test_before_after_shows_predictions_and_scores(tmp_path, channels, attack):
    attacked = attack == 'sig'
    clean = np.random.default_rng(0).integers(0, 256, (2, 9, 9, channels), np.uint8)
    images = {'clean': clean} | ({'triggered': 255 - clean} if attacked else {})
    labels, targets = np.array([1, 2], np.int32), np.zeros(3, np.int32)
    predictions = {
        'infected': {'clean': labels, 'triggered': targets[:2]},
        'aft': {'clean': labels, 'triggered': 3 - labels},
    }
    names = ('zero', 'one', 'two')
    examples = before_after.Examples(images, labels, targets if attacked else None, names, predictions)
    asr = (1.0, 0.1) if attacked else (None, None)
    measured = results(scores(0.9, asr[0]), attack, aft=scores(0.8, asr[1]))
    figure = before_after.draw(examples, measured)
    values, models = drawn_bars(figure)
    assert values == {'ACC': [90.0, 80.0]} | ({'ASR': [100.0, 10.0]} if attacked else {})
    assert models == ['infected' if attacked else 'benign', 'aft']

    axes = np.reshape(figure.subfigs[0].axes, (len(images), 2))
    for kind, row in zip(images, axes, strict=True):
        assert row[0].get_ylabel() == kind
        for i, axis in enumerate(row):
            np.testing.assert_array_equal(axis.images[0].get_array().reshape(clean[i].shape), images[kind][i])
    lines = {(text.get_text(), text.get_color()) for axis in axes[-1] for text in axis.texts}
    true, target, other = before_after.TRUE_COLOUR, before_after.TARGET_COLOUR, before_after.OTHER_COLOUR
    if attacked:
        assert lines == {('infected: zero', target), ('aft: two', other), ('aft: one', other)}
    else:
        assert lines == {(f'{model}: {name}', true) for model in ('infected', 'aft') for name in ('one', 'two')}
    before_after.write_before_after(tmp_path / 'report' / 'picture.png', examples, measured)
    with Image.open(tmp_path / 'report' / 'picture.png') as picture:
        assert picture.width == 1430


def test_write_bars_shows_every_score_with_its_deviation(tmp_path):
    groups = [
        Group({'attack': attack, 'label_mode': 'all2one', 'defense': defense}, (0, 1), spreads)
        for attack, defense, spreads in (
            ('sig', 'none', {'acc': Spread(0.9, 0.01), 'asr': Spread(0.75, None)}),
            ('sig', 'aft', {'acc': Spread(0.85, 0.02), 'asr': Spread(0.05, 0.03)}),
            ('none', 'aft', {'acc': Spread(0.6, None)}),
        )
    ]
    acc, asr = score_bars.draw_bars(groups).axes
    assert [label.get_text() for label in asr.get_xticklabels()] == ['sig\nall2one', 'benign\n']

    def bars(axis):
        drawn = [c for c in axis.containers if hasattr(c, 'patches')]
        return [(c.get_label(), round(c.patches[0].get_height(), 6), round(c.patches[0].get_x() + 0.2)) for c in drawn]

    assert acc.get_ylabel() == 'ACC %' and bars(acc) == [('none', 90, 0), ('aft', 85, 0), ('aft', 60, 1)]
    assert asr.get_ylabel() == 'ASR %' and bars(asr) == [('none', 75, 0), ('aft', 5, 0)]
    low, high = acc.collections[1].get_segments()[0][:, 1]
    assert (low, high) == (pytest.approx(83), pytest.approx(87))
    score_bars.write_bars(tmp_path / 'table.png', groups)
    assert {path.name for path in tmp_path.iterdir()} == {'table.png', 'table.svg'}


def test_relapse_figure_shows_the_mean_and_range_over_runs(tmp_path):
    rates = {'a': [0.0, 0.4], 'b': [0.2, 0.8]}
    rows = [
        {'run': run, 'model': model, 'per_class': number, 'step': step, 'asr': rate / number}
        for number in (1, 2)
        for model, run in (('infected', 'a'), ('infected', 'b'), ('aft', 'a'))
        for step, rate in zip((0, 10), rates[run], strict=True)
    ]
    axes = relapse_figure.draw(rows).axes
    assert [axis.get_title() for axis in axes] == ['1 a class', '2 a class']
    for axis, number in zip(axes, (1, 2), strict=True):
        infected, aft = axis.lines
        np.testing.assert_allclose(infected.get_xydata(), [[0, 10 / number], [10, 60 / number]])
        np.testing.assert_allclose(aft.get_xydata(), [[0, 0], [10, 40 / number]])
        heights = axis.collections[0].get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == (0, pytest.approx(80 / number))
    assert [line.get_label() for line in axes[0].lines] == ['infected', 'aft']
    relapse_figure.write(tmp_path / 'relapse.png', rows)
    assert (tmp_path / 'relapse.png').exists()


def test_choose_takes_one_image_of_each_class_with_another_target():
    labels = np.array([0, 0, 2, 1, 2, 1])
    np.testing.assert_array_equal(before_after.choose(labels, np.zeros(3, int), 8), [3, 2])
    np.testing.assert_array_equal(before_after.choose(labels, None, 2), [0, 3])


def test_check_available_without_matplotlib(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(UserError, match=r'aft_jax\[report\]'):
        requirements.check_available()


def test_magnified_difference_is_grey_at_zero():
    clean = np.array([[[100], [0]], [[10], [255]]], np.uint8)
    triggered = np.array([[[110], [0]], [[0], [0]]], np.uint8)
    np.testing.assert_array_equal(trigger_gallery.magnified_difference(clean, triggered)[..., 0], [[178, 128], [78, 0]])


def test_write_gallery_shows_every_attack(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 1), np.uint8)
    figure = trigger_gallery.draw({'sig': (images, 255 - images), 'blend': (images, images)})
    axes = np.reshape(figure.axes, (2, 6))
    assert [row[0].get_ylabel() for row in axes] == ['sig', 'blend']
    assert [axis.get_title() for axis in axes[0]] == ['clean', 'triggered', 'difference x5'] * 2
    shown = [axis.images[0].get_array() for axis in axes[:, 3:].flat]
    second = images[1, ..., 0]
    grey = np.full_like(second, 128)
    for actual, expected in zip(shown[:2] + shown[3:], [second, 255 - second, second, second, grey], strict=True):
        np.testing.assert_array_equal(actual, expected)
    trigger_gallery.write_gallery(tmp_path / 'one.png', {'sig': (images, images)})
    assert trigger_gallery.read(tmp_path / 'one.png').shape[1] == 858


def events(directory):
    """Yields the events of TensorBoard files. Each is stored as its length, a checksum, the event and a checksum."""
    for path in sorted(directory.rglob('events*')):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack('<Q', content[place : place + 8])
            yield Event.FromString(content[place + 12 : place + 12 + length])
            place += length + 16


def test_show_in_tensorboard_adds_the_pictures(tmp_path, make_run):
    run, before = make_run(), set(sys.modules)
    images = np.random.default_rng(0).integers(0, 256, (3, 9, 9, 1), np.uint8)
    triggers = RunFiles(run.workdir).report / 'triggers.png'
    trigger_gallery.write_gallery(triggers, {'sig': (images, 255 - images)})
    kinds = {'clean': images, 'adversarial': 255 - images}
    labels = np.array([0, 1, 2], np.int32)
    seen = Observation(labels, None, 0.1, kinds, {}, {}, (), {}, None)
    experiment_report.show_in_tensorboard(run, seen)
    run.writer.close()
    assert 'tensorflow' not in set(sys.modules) - before
    images_by_tag = {}
    for event in events(run.workdir / 'tensorboard' / 'report'):
        for value in event.summary.value:
            images_by_tag[value.tag] = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))
    assert images_by_tag.keys() == {'triggers', 'clean_adversarial'}
    np.testing.assert_array_equal(images_by_tag['triggers'], trigger_gallery.read(triggers))
    # Two rows of three images, each pixel 8 x 8, with white between them.
    mosaic = images_by_tag['clean_adversarial'][..., 0]
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
def test_progress_shows_the_time_left(stream, monkeypatch):
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
