"""Triggers against hand-made pixels and NumPy, and which images poisoning changes."""

import jax
import numpy as np
import pytest
from PIL import Image

from aft_jax import attacks
from aft_jax.attacks.attack import target_map, triggered
from aft_jax.attacks.poison import clean_indices, poison, poison_batch, poisoning_options, write_manifest
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


def poison_training_set(attack, dataset, config):
    return poison(attack, dataset.train_images, dataset.train_labels, poisoning_options(config))


def draw_clean(poisoned, config):
    return clean_indices(poisoned, config.clean_share, config.batch_size, config.seed)


def assert_rounded(actual, expected):
    """Asserts that uint8 `actual` is the float64 `expected`, in [0, 1], rounded to the nearest byte."""
    assert actual.dtype == np.uint8
    assert np.abs(actual - 255 * expected).max() < 0.5 + 1e-3


def test_target_class_is_that_of_all2one(config):
    config.attack.target = 2
    assert build(config, 'sig').target_class == 2
    config.attack.label_mode = 'all2all'
    with pytest.raises(ValueError, match='several target labels'):
        _ = build(config, 'sig').target_class


def test_target_map_of_both_label_modes():
    np.testing.assert_array_equal(target_map('all2one', 2, 4), np.array([2, 2, 2, 2], np.int32), strict=True)
    np.testing.assert_array_equal(target_map('all2all', 2, 4), np.array([1, 2, 3, 0], np.int32), strict=True)


def test_badnets_stamps_the_default_pattern_at_the_lower_right(config):
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
def test_badnets_stamps_any_pattern_anywhere(config, options, rows, columns):
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
def test_badnets_rejects_a_pattern_that_is_malformed_or_does_not_fit(config, options):
    with pytest.raises(UserError, match=r'attack\.badnets'):
        build(config, 'badnets', **options)


def test_blend_mixes_in_noise_from_the_seed(config):
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
def test_blend_mixes_in_a_picture(config, tmp_path, channels):
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


def test_blend_rejects_a_file_that_is_no_picture(config, tmp_path):
    (tmp_path / 'text.png').write_text('no picture')
    for name in ('text.png', 'absent.png'):
        with pytest.raises(UserError, match=name):
            build(config, 'blend', pattern_path=str(tmp_path / name))


def test_sig_adds_a_clipped_sinusoid(config):
    attack = build(config, 'sig', delta=0.3, frequency=2.0)
    wave = np.array([0.3 * np.sin(2 * np.pi * column * 2.0 / 5) for column in range(5)])[None, None, :, None]
    unclipped = FLOATS + wave
    assert unclipped.min() < 0 and unclipped.max() > 1
    np.testing.assert_allclose(apply(attack, FLOATS), np.clip(unclipped, 0, 1), atol=1e-6)
    assert_rounded(triggered(attack, BYTES), np.clip(BYTES / 255 + wave, 0, 1))


def test_triggered_does_not_depend_on_the_chunk(config):
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
    poisoned = poison_training_set(attack, dataset, config)
    assert poisoned.images.dtype == np.uint8 and poisoned.labels.dtype == np.int32
    assert len(poisoned.indices) == 8 and poisoned.indices.dtype == np.int32
    assert (np.diff(poisoned.indices) > 0).all() and len(poisoned.cross_indices) == 0
    rest = np.setdiff1d(np.arange(80), poisoned.indices)
    np.testing.assert_array_equal(poisoned.images[rest], images[rest])
    np.testing.assert_array_equal(poisoned.labels[rest], labels[rest])
    assert_rounded(poisoned.images[poisoned.indices], apply(attack, images[poisoned.indices].astype(np.float32) / 255))
    assert (poisoned.images[poisoned.indices] != images[poisoned.indices]).any(axis=(1, 2, 3)).all()
    target_labels = np.full(8, 1) if label_mode == 'all2one' else (labels[poisoned.indices] + 1) % 4
    np.testing.assert_array_equal(poisoned.labels[poisoned.indices], target_labels)


def test_poison_and_clean_indices_depend_on_the_seed_alone(dataset, config):
    attack = build(config, 'badnets', dataset.image_shape)

    def drawn():
        return poison_training_set(attack, dataset, config)

    first, again = drawn(), drawn()
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(draw_clean(first, config), draw_clean(again, config))
    config.seed = 1
    assert not np.array_equal(drawn().indices, first.indices)
    assert not np.array_equal(draw_clean(first, config), draw_clean(again._replace(indices=first.indices[:0]), config))


def test_poison_with_clean_label_changes_the_target_class_and_no_label(dataset, config):
    config.attack.target, config.attack.poisoned_share = 2, 0.25
    attack = build(config, 'sig', dataset.image_shape, clean_label=True)
    poisoned = poison_training_set(attack, dataset, config)
    assert len(poisoned.indices) == 5  # a quarter of the 20 images of class 2
    assert (dataset.train_labels[poisoned.indices] == 2).all()
    np.testing.assert_array_equal(poisoned.labels, dataset.train_labels)
    changed = np.flatnonzero((poisoned.images != dataset.train_images).any(axis=(1, 2, 3)))
    np.testing.assert_array_equal(changed, poisoned.indices)


def test_poison_changes_nothing_without_an_attack_or_per_batch(dataset, config):
    per_batch = build(config, 'badnets', dataset.image_shape)
    config.attack.poisoning = 'per_batch'
    for attack in (None, per_batch):
        poisoned = poison_training_set(attack, dataset, config)
        np.testing.assert_array_equal(poisoned.images, dataset.train_images)
        np.testing.assert_array_equal(poisoned.labels, dataset.train_labels)
        assert len(poisoned.indices) == len(poisoned.cross_indices) == 0


def test_poison_rejects_a_share_of_less_than_one_image(dataset, config):
    config.attack.poisoned_share = 0.005
    with pytest.raises(UserError, match=r'attack\.poisoned_share=0\.005 of 80'):
        poison_training_set(build(config, 'badnets', dataset.image_shape), dataset, config)


@pytest.mark.parametrize('label_mode', ['all2one', 'all2all'])
def test_poison_batch_changes_the_first_tenth_only(config, label_mode):
    config.attack.label_mode, config.attack.target = label_mode, 3
    attack = build(config, 'sig')
    images = GENERATOR.random((20, *SHAPE)).astype(np.float32)
    labels = (np.arange(20) % 4).astype(np.int32)
    out_images, out_labels = poison_batch(
        attack, jax.random.key(0), images, jax.numpy.asarray(labels), poisoning_options(config)
    )
    np.testing.assert_allclose(out_images[:2], apply(attack, images[:2]), atol=1e-6)
    np.testing.assert_array_equal(out_images[2:], images[2:])
    np.testing.assert_array_equal(out_labels[:2], [3, 3] if label_mode == 'all2one' else [1, 2])
    np.testing.assert_array_equal(out_labels[2:], labels[2:])
    assert out_labels.dtype == np.int32


def test_poison_batch_with_clean_label_changes_target_images_only(config):
    config.attack.target, config.attack.poisoned_share = 1, 0.4
    attack = build(config, 'sig', clean_label=True)
    images = GENERATOR.random((20, *SHAPE)).astype(np.float32)
    labels = (np.arange(20) % 4).astype(np.int32)
    out_images, out_labels = poison_batch(
        attack, jax.random.key(0), images, jax.numpy.asarray(labels), poisoning_options(config)
    )
    changed = np.flatnonzero((np.asarray(out_images) != images).any(axis=(1, 2, 3)))
    np.testing.assert_array_equal(changed, [1, 5])  # two of the five images of class 1
    np.testing.assert_allclose(out_images[changed], apply(attack, images[changed]), atol=1e-6)
    np.testing.assert_array_equal(out_labels, labels)


def test_clean_indices_are_unchanged_images(dataset, config):
    attack = build(config, 'badnets', dataset.image_shape)
    config.attack.poisoned_share, config.clean_share = 0.5, 0.5
    poisoned = poison_training_set(attack, dataset, config)
    clean = draw_clean(poisoned, config)
    np.testing.assert_array_equal(clean, np.setdiff1d(np.arange(80), poisoned.indices))  # all 40 that are left
    assert clean.dtype == np.int32
    with_cross = poisoned._replace(indices=poisoned.indices[:20], cross_indices=poisoned.indices[20:])
    np.testing.assert_array_equal(draw_clean(with_cross, config), clean)
    config.clean_share = 0.25
    few = draw_clean(poisoned, config)
    assert len(set(few)) == 20 and set(few) < set(clean)


@pytest.mark.parametrize(
    ('share', 'message'), [(0.6, '48 clean images, but only 40'), (0.05, 'is 4, fewer than a batch')]
)
def test_clean_indices_rejects_a_share_that_is_too_large_or_too_small(dataset, config, share, message):
    attack = build(config, 'badnets', dataset.image_shape)
    config.attack.poisoned_share, config.clean_share = 0.5, share
    poisoned = poison_training_set(attack, dataset, config)
    with pytest.raises(UserError, match=f'clean_share={share}.*{message}'):
        draw_clean(poisoned, config)


def test_write_manifest(dataset, config, tmp_path):
    attack = build(config, 'blend', dataset.image_shape)
    poisoned = poison_training_set(attack, dataset, config)
    clean = draw_clean(poisoned, config)
    write_manifest(tmp_path / 'poison.npz', attack, poisoned, clean)
    with np.load(tmp_path / 'poison.npz', allow_pickle=False) as manifest:
        assert {'poisoned_indices', 'cross_indices', 'clean_indices', 'target_map'} <= set(manifest)
        np.testing.assert_array_equal(manifest['poisoned_indices'], poisoned.indices, strict=True)
        np.testing.assert_array_equal(manifest['cross_indices'], poisoned.cross_indices, strict=True)
        np.testing.assert_array_equal(manifest['clean_indices'], clean, strict=True)
        np.testing.assert_array_equal(manifest['target_map'], np.zeros(4, np.int32), strict=True)
        np.testing.assert_array_equal(manifest['trigger_pattern'], attack.arrays['pattern'], strict=True)
        assert manifest['trigger_alpha'] == np.float32(0.1)
    assert [path.name for path in tmp_path.iterdir()] == ['poison.npz']  # no temporary file is left


def test_write_manifest_without_an_attack(dataset, config, tmp_path):
    poisoned = poison_training_set(None, dataset, config)
    write_manifest(tmp_path / 'poison.npz', None, poisoned, draw_clean(poisoned, config))
    with np.load(tmp_path / 'poison.npz', allow_pickle=False) as manifest:
        assert len(manifest['poisoned_indices']) == len(manifest['target_map']) == 0
        assert len(manifest['clean_indices']) == 20
