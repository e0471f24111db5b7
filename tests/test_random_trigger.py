"""Random triggers: their shapes, what each kind does to an image, and that a draw can be repeated."""

from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, shift

from aft_jax import attacks
from aft_jax.attacks import random_trigger, trigger_functions
from aft_jax.attacks.attack import triggered
from aft_jax.attacks.random_trigger import FAMILIES, GEOMETRIC_KINDS, GLOBAL_KINDS, draw
from aft_jax.attacks.trigger_shapes import SHAPES
from aft_jax.config import resolve

SHAPE = (28, 28, 1)
IMAGES = np.random.default_rng(0).random((5, 12, 16, 3), np.float32)
DRAWS = [draw(seed, SHAPE) for seed in range(200)]


def first_of(kind):
    """Returns the first draw of a kind."""
    return next(drawn for drawn in DRAWS if drawn.kind == kind)


@pytest.mark.parametrize('name', SHAPES)
def test_shapes_have_about_the_wanted_area_and_reach_all_edges(name):
    edges = np.zeros(4)
    for seed in range(60):
        generator = np.random.default_rng(seed)
        wanted = int(generator.integers(4, 118))
        mask = SHAPES[name](generator, 28, 28, wanted)
        assert mask.shape == (28, 28) and mask.dtype == bool
        assert 1 <= mask.sum() <= 2.2 * wanted + 8
        edges += [mask[0].any(), mask[-1].any(), mask[:, 0].any(), mask[:, -1].any()]
    assert (edges > 0).all()


def test_draw_gives_every_family_and_kind():
    families = Counter(drawn.family for drawn in DRAWS)
    for family, probability in FAMILIES.items():
        assert abs(families[family] / len(DRAWS) - probability) < 0.12
    assert {drawn.kind for drawn in DRAWS} >= {*SHAPES, *GLOBAL_KINDS, *GEOMETRIC_KINDS, 'place', 'fill'}
    local = [drawn for drawn in DRAWS if drawn.family == 'local']
    assert {drawn.facts['fill'] for drawn in local} == set(random_trigger.FILLS)
    assert all(0.2 <= drawn.facts['opacity'] <= 1 and 0.004 <= drawn.facts['area'] <= 0.3 for drawn in local)


@pytest.mark.parametrize('seed', range(24))
@pytest.mark.parametrize('shape', [(12, 16, 3)])
def test_draw_is_repeatable_and_changes_images(seed, shape):
    first, second = draw(seed, shape), draw(seed, shape)
    assert random_trigger.describe(first) == random_trigger.describe(second)
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(array, second.arrays[name])
        assert array.dtype == np.float32
    changed = np.asarray(first.trigger(first.arrays, jnp.asarray(IMAGES)))
    assert changed.shape == IMAGES.shape and changed.dtype == np.float32
    assert changed.min() >= -1e-6 and changed.max() <= 1 + 1e-6
    assert np.abs(changed - IMAGES).max() > 0.01
    if first.family == 'local':
        untouched = (first.arrays['opacity'] == 0)[..., 0]
        np.testing.assert_array_equal(changed[:, untouched], IMAGES[:, untouched])


def test_invert_and_gamma_and_quantise_equal_numpy():
    opacity = np.random.default_rng(1).random((12, 16, 1), np.float32)
    inverted = trigger_functions.invert({'opacity': opacity}, IMAGES)
    np.testing.assert_allclose(inverted, (1 - opacity) * IMAGES + opacity * (1 - IMAGES), atol=1e-6)
    np.testing.assert_allclose(trigger_functions.gamma({'gamma': np.float32(2)}, IMAGES), IMAGES**2, atol=1e-6)
    levels = np.asarray(trigger_functions.quantise({'levels': np.float32(3)}, IMAGES))
    assert set(np.unique(levels)) == {0, 0.5, 1} and np.abs(levels - IMAGES).max() <= 0.25 + 1e-6


def test_filter_gaussian_equals_scipy_inside_the_frame():
    drawn = first_of('blur')
    images = np.random.default_rng(2).random((2, *SHAPE), np.float32)
    expected = gaussian_filter(images, (0, drawn.facts['sigma'], drawn.facts['sigma'], 0), truncate=8)
    actual = np.asarray(drawn.trigger(drawn.arrays, jnp.asarray(images)))
    np.testing.assert_allclose(actual[:, 10:18, 10:18], expected[:, 10:18, 10:18], atol=1e-3)


def test_shift_equals_scipy():
    drawn = first_of('shift')
    images = np.random.default_rng(3).random((2, *SHAPE), np.float32)
    expected = shift(images, (0, drawn.facts['down'], drawn.facts['right'], 0), order=1)
    np.testing.assert_allclose(drawn.trigger(drawn.arrays, jnp.asarray(images)), expected, atol=1e-4)


@pytest.mark.parametrize('kind', ['place', 'fill'])
def test_paste_variant_depends_on_the_image_alone(kind):
    drawn = first_of(kind)
    images = np.random.default_rng(4).integers(0, 256, (40, *SHAPE)).astype(np.uint8)
    attack = attacks.Attack('random', np.zeros(10, np.int32), drawn.arrays, drawn.trigger)
    together = triggered(attack, images)
    np.testing.assert_array_equal(together[7:8], triggered(attack, images[7:8]))
    chosen = images.astype(np.int64).sum(axis=(1, 2, 3)) % len(drawn.arrays['pattern'])
    assert len(set(chosen)) == random_trigger.VARIANTS
    for image, after, i in zip(images, together, chosen, strict=True):
        opacity, pattern = drawn.arrays['opacity'][i], drawn.arrays['pattern'][i]
        expected = 255 * ((1 - opacity) * (image / 255) + opacity * pattern)
        assert np.abs(after - expected).max() <= 0.5 + 1e-3


def test_build_draws_by_its_own_seed(config):
    config.attack.name = 'random'
    config.attack.random.seed = 3
    first = attacks.build(resolve(config), SHAPE, 10)
    config.seed = 8
    again = attacks.build(resolve(config), SHAPE, 10)
    config.attack.random.seed = 4
    other = attacks.build(resolve(config), SHAPE, 10)
    assert first.arrays.keys() == again.arrays.keys()
    assert all((first.arrays[name] == again.arrays[name]).all() for name in first.arrays)
    assert first.arrays.keys() != other.arrays.keys() or any(
        not np.array_equal(first.arrays[name], other.arrays[name]) for name in first.arrays
    )
