"""Triggers against hand-made pixels and NumPy; what poisoning changes and what it leaves alone."""

import jax
import numpy as np
import pytest
from PIL import Image

from aft_jax import attacks
from aft_jax.attacks.attack import target_map, triggered
from aft_jax.attacks.poison import clean_indices, poison, poison_batch, write_manifest
from aft_jax.errors import UserError

GENERATOR = np.random.default_rng(0)
FLOATS = GENERATOR.random((4, 6, 5, 3)).astype(np.float32)
BYTES = GENERATOR.integers(0, 256, (7, 6, 5, 3)).astype(np.uint8)
SHAPE = (6, 5, 3)


def build(config, name, shape=SHAPE, classes=4, **options):
    config.attack.name = name
    config.attack[name].update(options)
    return attacks.build(config, shape, classes)


def apply(attack, images):
    return np.asarray(attack.trigger(attack.arrays, images))


def assert_rounded(actual, expected):
    """Asserts that uint8 `actual` is the float64 `expected`, in [0, 1], rounded to the nearest byte."""
    assert actual.dtype == np.uint8
    assert np.abs(actual - 255 * expected).max() < 0.5 + 1e-3


def test_target_maps():
    np.testing.assert_array_equal(target_map('all2one', 2, 4), np.array([2, 2, 2, 2], np.int32), strict=True)
    np.testing.assert_array_equal(target_map('all2all', 2, 4), np.array([1, 2, 3, 0], np.int32), strict=True)


def test_badnets_default_patch(config):
    expected = FLOATS.copy()
    for row, column, value in [
        (3, 2, 0),
        (3, 3, 0),
        (3, 4, 1),
        (4, 2, 0),
        (4, 3, 1),
        (4, 4, 0),
        (5, 2, 1),
        (5, 3, 0),
        (5, 4, 1),
    ]:
        expected[:, row, column, :] = value
    np.testing.assert_array_equal(apply(build(config, 'badnets'), FLOATS), expected)


@pytest.mark.parametrize(
    ('options', 'rows', 'columns'),
    [
        ({'row': 0, 'column': 1}, slice(0, 2), slice(1, 4)),
        ({'row': 4, 'column': 2}, slice(4, 6), slice(2, 5)),
        ({'row': -2, 'column': -1}, slice(3, 5), slice(2, 5)),
        ({'row': -1, 'column': 0}, slice(4, 6), slice(0, 3)),
    ],
)
def test_badnets_pattern_and_place(config, options, rows, columns):
    expected = FLOATS.copy()
    expected[:, rows, columns, :] = np.array([[1, 1, 0], [0, 0, 1]])[None, :, :, None]
    attack = build(config, 'badnets', pattern='110/001', **options)
    np.testing.assert_array_equal(apply(attack, FLOATS), expected)


@pytest.mark.parametrize(
    'options',
    [
        {'row': 4},
        {'column': 3},
        {'row': -5},
        {'pattern': '111111'},
        {'pattern': '01/0'},
        {'pattern': '012'},
        {'pattern': ''},
        {'pattern': '1//1'},
    ],
)
def test_badnets_that_cannot_be(config, options):
    with pytest.raises(UserError, match=r'attack\.badnets'):
        build(config, 'badnets', **options)


def test_blend_equals_numpy_with_a_noise_pattern_from_the_seed(config):
    attack = build(config, 'blend', alpha=0.3)
    pattern = attack.arrays['pattern']
    assert pattern.shape == SHAPE and pattern.dtype == np.float32
    assert 0 <= pattern.min() < 0.2 and 0.8 < pattern.max() < 1
    np.testing.assert_allclose(apply(attack, FLOATS), 0.7 * FLOATS + 0.3 * pattern, atol=1e-6)
    assert_rounded(triggered(attack, BYTES), 0.7 * BYTES / 255 + 0.3 * pattern.astype(np.float64))
    np.testing.assert_array_equal(build(config, 'blend').arrays['pattern'], pattern)
    config.seed = 1
    assert not np.array_equal(build(config, 'blend').arrays['pattern'], pattern)


@pytest.mark.parametrize('channels', [1, 3])
def test_blend_with_a_picture(config, tmp_path, channels):
    picture = GENERATOR.integers(0, 256, (6, 5, channels)).astype(np.uint8)
    path = tmp_path / 'pattern.png'
    Image.fromarray(picture.squeeze()).save(path)
    attack = build(config, 'blend', shape=(6, 5, channels), alpha=0.2, pattern_path=str(path))
    images = BYTES[..., :channels]
    assert_rounded(triggered(attack, images), 0.8 * images / 255 + 0.2 * picture / 255)


def test_blend_resizes_the_picture_and_gives_it_the_images_channels(config, tmp_path):
    path = tmp_path / 'red.png'
    Image.new('RGB', (40, 30), (200, 0, 50)).save(path)
    attack = build(config, 'blend', alpha=0.5, pattern_path=str(path))
    expected = np.broadcast_to(np.array([200, 0, 50], np.float32) / 255, SHAPE)
    np.testing.assert_allclose(attack.arrays['pattern'], expected, atol=1e-6)
    grey = build(config, 'blend', shape=(6, 5, 1), pattern_path=str(path)).arrays['pattern']
    # ITU-R 601, which PIL uses for grey: 0.299 R + 0.587 G + 0.114 B.
    np.testing.assert_allclose(grey, np.full((6, 5, 1), (0.299 * 200 + 0.114 * 50) / 255), atol=1 / 255)


def test_blend_without_a_picture_there(config, tmp_path):
    (tmp_path / 'text.png').write_text('no picture')
    for name in ('text.png', 'absent.png'):
        with pytest.raises(UserError, match=name):
            build(config, 'blend', pattern_path=str(tmp_path / name))


def test_sig_equals_numpy(config):
    attack = build(config, 'sig', delta=0.3, frequency=2.0)
    wave = np.array([0.3 * np.sin(2 * np.pi * column * 2.0 / 5) for column in range(5)])[None, None, :, None]
    unclipped = FLOATS + wave
    assert unclipped.min() < 0 and unclipped.max() > 1
    np.testing.assert_allclose(apply(attack, FLOATS), np.clip(unclipped, 0, 1), atol=1e-6)
    assert_rounded(triggered(attack, BYTES), np.clip(BYTES / 255 + wave, 0, 1))


def test_triggered_images_do_not_depend_on_the_chunk(config):
    attack = build(config, 'sig')
    whole = triggered(attack, BYTES)
    np.testing.assert_array_equal(triggered(attack, BYTES, chunk=3), whole)
    np.testing.assert_array_equal(triggered(attack, BYTES[2:3]), whole[2:3])


@pytest.mark.parametrize('label_mode', ['all2one', 'all2all'])
@pytest.mark.parametrize('name', ['badnets', 'blend', 'sig'])
def test_poison_changes_a_share_and_nothing_else(dataset, config, name, label_mode):
    config.attack.label_mode, config.attack.target = label_mode, 1
    attack = build(config, name, dataset.image_shape)
    images, labels = dataset.train_images, dataset.train_labels
    poisoned = poison(attack, images, labels, config)
    assert poisoned.images.dtype == np.uint8 and poisoned.labels.dtype == np.int32
    assert len(poisoned.indices) == 8 and poisoned.indices.dtype == np.int32
    assert (np.diff(poisoned.indices) > 0).all() and len(poisoned.cross_indices) == 0
    rest = np.setdiff1d(np.arange(80), poisoned.indices)
    np.testing.assert_array_equal(poisoned.images[rest], images[rest])
    np.testing.assert_array_equal(poisoned.labels[rest], labels[rest])
    assert_rounded(poisoned.images[poisoned.indices], apply(attack, images[poisoned.indices].astype(np.float32) / 255))
    assert (poisoned.images[poisoned.indices] != images[poisoned.indices]).any(axis=(1, 2, 3)).all()
    commanded = np.full(8, 1) if label_mode == 'all2one' else (labels[poisoned.indices] + 1) % 4
    np.testing.assert_array_equal(poisoned.labels[poisoned.indices], commanded)


def test_the_seed_alone_decides_who_is_poisoned(dataset, config):
    attack = build(config, 'badnets', dataset.image_shape)

    def drawn():
        return poison(attack, dataset.train_images, dataset.train_labels, config)

    first, again = drawn(), drawn()
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(clean_indices(first, config), clean_indices(again, config))
    config.seed = 1
    assert not np.array_equal(drawn().indices, first.indices)
    assert not np.array_equal(
        clean_indices(first, config), clean_indices(again._replace(indices=first.indices[:0]), config)
    )


def test_clean_label_poisons_the_target_class_and_leaves_labels(dataset, config):
    config.attack.target, config.attack.poisoned_share = 2, 0.25
    attack = build(config, 'sig', dataset.image_shape, clean_label=True)
    poisoned = poison(attack, dataset.train_images, dataset.train_labels, config)
    assert len(poisoned.indices) == 5  # a quarter of the 20 images of class 2
    assert (dataset.train_labels[poisoned.indices] == 2).all()
    np.testing.assert_array_equal(poisoned.labels, dataset.train_labels)
    changed = np.flatnonzero((poisoned.images != dataset.train_images).any(axis=(1, 2, 3)))
    np.testing.assert_array_equal(changed, poisoned.indices)


def test_without_an_attack_or_batch_by_batch_the_stored_images_stay(dataset, config):
    per_batch = build(config, 'badnets', dataset.image_shape)
    config.attack.poisoning = 'per_batch'
    for attack in (None, per_batch):
        poisoned = poison(attack, dataset.train_images, dataset.train_labels, config)
        np.testing.assert_array_equal(poisoned.images, dataset.train_images)
        np.testing.assert_array_equal(poisoned.labels, dataset.train_labels)
        assert len(poisoned.indices) == len(poisoned.cross_indices) == 0


def test_a_share_of_less_than_an_image(dataset, config):
    config.attack.poisoned_share = 0.005
    with pytest.raises(UserError, match=r'attack\.poisoned_share=0\.005 of 80'):
        poison(build(config, 'badnets', dataset.image_shape), dataset.train_images, dataset.train_labels, config)


@pytest.mark.parametrize('label_mode', ['all2one', 'all2all'])
def test_per_batch_poisons_the_first_tenth_only(config, label_mode):
    config.attack.label_mode, config.attack.target = label_mode, 3
    attack = build(config, 'sig')
    images = GENERATOR.random((20, *SHAPE)).astype(np.float32)
    labels = (np.arange(20) % 4).astype(np.int32)
    out_images, out_labels = poison_batch(attack, jax.random.key(0), images, jax.numpy.asarray(labels), config)
    np.testing.assert_allclose(out_images[:2], apply(attack, images[:2]), atol=1e-6)
    np.testing.assert_array_equal(out_images[2:], images[2:])
    np.testing.assert_array_equal(out_labels[:2], [3, 3] if label_mode == 'all2one' else [1, 2])
    np.testing.assert_array_equal(out_labels[2:], labels[2:])
    assert out_labels.dtype == np.int32


def test_per_batch_clean_label_poisons_target_images_only(config):
    config.attack.target, config.attack.poisoned_share = 1, 0.4
    attack = build(config, 'sig', clean_label=True)
    images = GENERATOR.random((20, *SHAPE)).astype(np.float32)
    labels = (np.arange(20) % 4).astype(np.int32)
    out_images, out_labels = poison_batch(attack, jax.random.key(0), images, jax.numpy.asarray(labels), config)
    changed = np.flatnonzero((np.asarray(out_images) != images).any(axis=(1, 2, 3)))
    np.testing.assert_array_equal(changed, [1, 5])  # two of the five images of class 1
    np.testing.assert_allclose(out_images[changed], apply(attack, images[changed]), atol=1e-6)
    np.testing.assert_array_equal(out_labels, labels)


def test_the_defender_gets_images_that_nobody_changed(dataset, config):
    attack = build(config, 'badnets', dataset.image_shape)
    config.attack.poisoned_share, config.clean_share = 0.5, 0.5
    poisoned = poison(attack, dataset.train_images, dataset.train_labels, config)
    clean = clean_indices(poisoned, config)
    np.testing.assert_array_equal(clean, np.setdiff1d(np.arange(80), poisoned.indices))  # all 40 that are left
    assert clean.dtype == np.int32
    cross_images = poisoned._replace(indices=poisoned.indices[:20], cross_indices=poisoned.indices[20:])
    np.testing.assert_array_equal(clean_indices(cross_images, config), clean)
    config.clean_share = 0.25
    few = clean_indices(poisoned, config)
    assert len(set(few)) == 20 and set(few) < set(clean)


@pytest.mark.parametrize(('share', 'told'), [(0.6, '48 clean images, but only 40'), (0.05, 'is 4, fewer than a batch')])
def test_a_clean_share_that_cannot_be(dataset, config, share, told):
    attack = build(config, 'badnets', dataset.image_shape)
    config.attack.poisoned_share, config.clean_share = 0.5, share
    poisoned = poison(attack, dataset.train_images, dataset.train_labels, config)
    with pytest.raises(UserError, match=f'clean_share={share}.*{told}'):
        clean_indices(poisoned, config)


def test_manifest(dataset, config, tmp_path):
    attack = build(config, 'blend', dataset.image_shape)
    poisoned = poison(attack, dataset.train_images, dataset.train_labels, config)
    clean = clean_indices(poisoned, config)
    write_manifest(tmp_path / 'poison.npz', attack, poisoned, clean)
    with np.load(tmp_path / 'poison.npz', allow_pickle=False) as manifest:
        assert {'poisoned_indices', 'cross_indices', 'clean_indices', 'target_map'} <= set(manifest)
        np.testing.assert_array_equal(manifest['poisoned_indices'], poisoned.indices, strict=True)
        np.testing.assert_array_equal(manifest['cross_indices'], poisoned.cross_indices, strict=True)
        np.testing.assert_array_equal(manifest['clean_indices'], clean, strict=True)
        np.testing.assert_array_equal(manifest['target_map'], np.zeros(4, np.int32), strict=True)
        np.testing.assert_array_equal(manifest['trigger_pattern'], attack.arrays['pattern'], strict=True)
        assert manifest['trigger_alpha'] == np.float32(0.1)
    assert [path.name for path in tmp_path.iterdir()] == ['poison.npz']  # nothing half-written beside it


def test_manifest_without_an_attack(dataset, config, tmp_path):
    poisoned = poison(None, dataset.train_images, dataset.train_labels, config)
    write_manifest(tmp_path / 'poison.npz', None, poisoned, clean_indices(poisoned, config))
    with np.load(tmp_path / 'poison.npz', allow_pickle=False) as manifest:
        assert len(manifest['poisoned_indices']) == len(manifest['target_map']) == 0
        assert len(manifest['clean_indices']) == 20
