"""Augmentation against explicit NumPy crops, mirrors and SciPy rotations."""

import jax
import numpy as np
import pytest
import scipy.ndimage
import scipy.optimize

from aft_jax.data import augment as module
from aft_jax.data.augment import AugmentOptions

IMAGES = np.random.default_rng(0).random((240, 6, 9, 2)).astype(np.float32)


def options(crop=0, flip=False, rotation=0.0):
    return AugmentOptions(crop, flip, rotation)


def augment(seed, images, options):
    return np.asarray(jax.jit(lambda key: module.augment(key, images, options))(jax.random.key(seed)))


def crops_of(image, crop):
    """All (2 crop + 1)^2 crops of the padded image, by their corner."""
    height, width, _ = image.shape
    padded = np.zeros((height + 2 * crop, width + 2 * crop, image.shape[2]), image.dtype)
    padded[crop : crop + height, crop : crop + width] = image
    corners = range(2 * crop + 1)
    return {(i, j): padded[i : i + height, j : j + width] for i in corners for j in corners}


def rotated(image, degrees):
    """SciPy's bilinear rotation about the centre, black outside."""
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = (np.array(image.shape[:2]) - 1) / 2
    offset = centre - turn @ centre
    channels = np.moveaxis(image.astype(np.float64), -1, 0)
    return np.stack(
        [scipy.ndimage.affine_transform(c, turn, offset, order=1, mode='grid-constant') for c in channels], axis=-1
    )


def test_augment_without_options_leaves_the_images_alone():
    np.testing.assert_array_equal(augment(0, IMAGES, options()), IMAGES)


@pytest.mark.parametrize('crop', [1, 2])
def test_augment_shifts_as_a_crop_of_the_padded_image(crop):
    moved = augment(1, IMAGES, options(crop=crop))
    assert moved.dtype == np.float32
    corners = []
    for image, result in zip(IMAGES, moved, strict=True):
        matching = [corner for corner, cut in crops_of(image, crop).items() if np.array_equal(cut, result)]
        assert len(matching) == 1  # a crop of this very image: rows keep their place, and so their labels
        corners += matching
    assert len(set(corners)) == (2 * crop + 1) ** 2  # every offset occurs


def test_augment_mirrors_about_half_of_the_images():
    flipped = augment(2, IMAGES, options(flip=True))
    mirrored = [np.array_equal(result, image[:, ::-1]) for image, result in zip(IMAGES, flipped, strict=True)]
    unchanged = [np.array_equal(result, image) for image, result in zip(IMAGES, flipped, strict=True)]
    assert all(m != u for m, u in zip(mirrored, unchanged, strict=True))
    assert 90 < sum(mirrored) < 150


def test_augment_rotates_as_scipy_by_some_angle_within_the_bound():
    bound = 20.0
    images = IMAGES[:12]
    turned = augment(3, images, options(rotation=bound))
    angles = []
    for image, result in zip(images, turned, strict=True):

        def distance(angle, image=image, result=result):
            return np.abs(rotated(image, angle) - result).max()

        rough = min(np.linspace(-bound, bound, 81), key=distance)
        fine = scipy.optimize.minimize_scalar(
            distance, bounds=(rough - 0.5, rough + 0.5), method='bounded', options={'xatol': 1e-7}
        )
        assert fine.fun < 1e-5
        angles.append(fine.x)
    assert np.abs(angles).max() <= bound
    assert min(angles) < -5 and max(angles) > 5


def test_rotate_by_zero_is_exact():
    rotate = jax.jit(module._rotate, static_argnums=2)
    np.testing.assert_array_equal(rotate(jax.random.key(0), IMAGES[:4], 0.0), IMAGES[:4])


def test_augment_depends_on_the_key():
    everything = options(crop=1, flip=True, rotation=10.0)
    compiled = jax.jit(lambda key: module.augment(key, IMAGES[:8], everything))
    first, again, other = (compiled(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_cut_mix_pastes_a_rectangle_of_the_neighbour_into_each_image():
    """Each pixel is that of one image or of the other; all positions and sizes of the rectangle occur."""
    count, side, largest = 2000, 8, 0.5
    images = np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None, None], (count, side, side, 1))
    mixed = np.asarray(module.cut_mix(jax.random.key(1), images, largest))[..., 0]
    neighbour = np.roll(np.arange(count), 1)[:, None, None]
    inside = mixed == neighbour
    assert np.all(inside | (mixed == np.arange(count)[:, None, None]))
    rows, columns = inside.any(axis=2), inside.any(axis=1)
    np.testing.assert_array_equal(inside, rows[:, :, None] & columns[:, None, :])
    for line in (rows, columns):  # one stretch, without a gap
        assert np.all(np.abs(np.diff(np.pad(line, ((0, 0), (1, 1))).astype(int), axis=1)).sum(axis=1) <= 2)
    assert np.all(np.abs(rows.sum(axis=1) - columns.sum(axis=1)) <= 1)
    shares = inside.mean(axis=(1, 2))
    assert abs(shares.mean() - largest / 2) < 0.02 and shares.max() < 0.75
    # Positions are as often near one end as near the other.
    assert np.abs(rows.mean(axis=0) - rows.mean(axis=0)[::-1]).max() < 0.05
