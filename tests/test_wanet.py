"""WaNet: the grid, the warp, its noise mode, and which images are poisoned. (Against torch: tests/parity.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aft_jax import attacks, validation
from aft_jax.attacks import wanet
from aft_jax.attacks.attack import cross_images
from aft_jax.attacks.poison import NO_INDICES, Poisoned, poison, poison_batch, poisoning_options, write_manifest
from aft_jax.errors import UserError
from aft_jax.runtime.sharding import batch_sharding, make_mesh, replicated

GENERATOR = np.random.default_rng(0)
SHAPES = [(28, 28, 1), (32, 32, 3), (64, 64, 3), (20, 30, 1)]


def build(config, shape=(8, 8, 1), **options):
    config.attack.name = 'wanet'
    config.attack.wanet.update(options)
    return attacks.build(config, shape, 4)


def smooth_images(count, height, width, channels):
    """Images on which a shift by d pixels changes a value by d / 100 times the direction's slope."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing='ij')
    return np.tile((0.1 + 0.01 * rows + 0.002 * columns)[None, :, :, None], (count, 1, 1, channels)).astype(np.float32)


@pytest.mark.parametrize('shape', SHAPES)
def test_build_makes_a_grid_and_its_field(config, shape):
    arrays = build(config, shape).arrays
    assert arrays['grid'].shape == (4, 4, 2) and arrays['field'].shape == (*shape[:2], 2)
    assert (
        np.abs(arrays['grid']).mean() == pytest.approx(1) and arrays['grid'].min() < -0.5 < 0.5 < arrays['grid'].max()
    )
    assert np.abs(arrays['field']).max() <= 1
    # The corners of the grid are the corners of the field.
    corner = np.clip(-1 + 0.5 * arrays['grid'][0, 0] / np.array([shape[1], shape[0]]), -1, 1)
    np.testing.assert_allclose(arrays['field'][0, 0], corner, atol=1e-6)


def test_build_draws_the_grid_from_the_seed_alone(config):
    first = build(config).arrays['grid']
    np.testing.assert_array_equal(first, build(config, (28, 28, 1)).arrays['grid'])
    config.seed = 1
    assert not np.array_equal(first, build(config).arrays['grid'])


@pytest.mark.parametrize('shape', SHAPES)
def test_warp_with_a_constant_grid_shifts_by_as_many_pixels_along_both_axes(shape):
    height, width, channels = shape
    grid = np.ones((4, 4, 2), np.float32)
    images = smooth_images(2, *shape)
    warp = jax.jit(wanet.warp)
    shifted = np.asarray(warp({'field': wanet.warping_field(grid, 0.5, height, width)}, images))
    # strength / H in [-1, 1] is strength (H - 1) / 2 H pixels.
    moved = 0.01 * 0.25 * (height - 1) / height + 0.002 * 0.25 * (width - 1) / width
    np.testing.assert_allclose((shifted - images)[:, :-1, :-1], moved, atol=2e-6)
    still = np.asarray(warp({'field': wanet.warping_field(grid, 0.0, height, width)}, images))
    np.testing.assert_allclose(still, images, atol=2e-6)


def test_warp_with_noise_differs_between_pixels_and_images(config):
    attack = build(config, (28, 28, 1))
    images = jnp.asarray(smooth_images(3, 28, 28, 1))
    warped = attack.trigger(attack.arrays, images)
    noisy = attack.cross_mode(attack.arrays, images, images, jax.random.key(1))
    differences = np.asarray(noisy - warped)
    assert (np.abs(differences[0] - differences[1]) > 1e-4).mean() > 0.9
    assert (np.abs(differences[:, 1:] - differences[:, :-1]) > 1e-4).mean() > 0.9
    assert 0.001 < np.abs(differences).max() <= 0.012 * 0.5 + 1e-6
    np.testing.assert_array_equal(noisy, attack.cross_mode(attack.arrays, images, images, jax.random.key(1)))
    assert not np.array_equal(noisy, attack.cross_mode(attack.arrays, images, images, jax.random.key(2)))


def test_cross_images_draws_new_noise_in_every_chunk(config):
    images = np.tile(GENERATOR.integers(0, 256, (1, 8, 8, 1)).astype(np.uint8), (7, 1, 1, 1))
    noisy = cross_images(build(config), images, jax.random.key(0), chunk=3)
    assert len(np.unique(noisy.reshape(7, -1), axis=0)) == 7


@pytest.mark.parametrize('label_mode', attacks.LABEL_MODES)
def test_poison_changes_triggered_and_noise_mode_images(dataset, config, tmp_path, label_mode):
    config.attack.label_mode = label_mode
    attack = build(config)
    poisoned = poison(attack, dataset.train_images, dataset.train_labels, poisoning_options(config))
    assert len(poisoned.indices) == 8 and len(poisoned.cross_indices) == 16
    changed = (poisoned.images != dataset.train_images).any(axis=(1, 2, 3))
    assert set(np.flatnonzero(changed)) == set(poisoned.indices) | set(poisoned.cross_indices)
    expected = dataset.train_labels.copy()
    expected[poisoned.indices] = attack.target_map[expected[poisoned.indices]]
    np.testing.assert_array_equal(poisoned.labels, expected)
    write_manifest(tmp_path / 'poison.npz', attack, poisoned, NO_INDICES)
    with np.load(tmp_path / 'poison.npz') as manifest:
        np.testing.assert_array_equal(manifest['cross_indices'], poisoned.cross_indices)
        np.testing.assert_array_equal(manifest['trigger_grid'], attack.arrays['grid'])


@pytest.mark.parametrize('devices', [1, 4])
def test_poison_batch_is_the_same_on_all_devices(config, devices):
    config.attack.poisoned_share, config.attack.poisoning = 0.25, 'per_batch'
    attack = build(config)
    images, labels = GENERATOR.random((8, 8, 8, 1)).astype(np.float32), (np.arange(8) % 4).astype(np.int32)
    mesh = make_mesh(jax.devices()[:devices])
    call = jax.jit(
        lambda x, y, key: poison_batch(attack, key, x, y, poisoning_options(config)),
        in_shardings=(batch_sharding(mesh, 0), batch_sharding(mesh, 0), replicated(mesh)),
        out_shardings=replicated(mesh),
    )
    key = jax.random.key(3)
    changed, changed_labels = call(images, labels, key)
    np.testing.assert_allclose(changed[:2], attack.trigger(attack.arrays, images[:2]), atol=1e-6)
    noisy = attack.cross_mode(attack.arrays, jnp.asarray(images[2:6]), jnp.asarray(images[2:6]), key)
    np.testing.assert_allclose(changed[2:6], noisy, atol=1e-6)
    np.testing.assert_array_equal(changed[6:], images[6:])
    np.testing.assert_array_equal(changed_labels, [0, 0, *labels[2:]])


def test_poison_changes_nothing_per_batch(dataset, config):
    config.attack.poisoning = 'per_batch'
    poisoned = poison(build(config), dataset.train_images, dataset.train_labels, poisoning_options(config))
    assert isinstance(poisoned, Poisoned) and poisoned.images is dataset.train_images and len(poisoned.indices) == 0


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('wanet.grid', 1, 'wanet.grid'),
        ('wanet.strength', 0.0, 'wanet.strength'),
        ('wanet.cross_ratio', -1.0, 'wanet.cross_ratio'),
        ('poisoned_share', 0.5, 'at most 0.333'),
    ],
)
def test_validate_rejects_options(config, field, value, message):
    config.attack.name, config.dataset = 'wanet', 'mnist5k'
    config.attack.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        validation.validate(config)


def test_build_rejects_a_grid_finer_than_the_image(config):
    with pytest.raises(UserError, match=r'attack\.wanet\.grid=9 .* 8x8'):
        build(config, grid=9)
