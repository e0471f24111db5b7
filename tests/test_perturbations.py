"""Adversarial perturbations against SciPy's interpolation, and against closed forms on a linear classifier."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.interpolate
import scipy.ndimage

from aft_jax.adversarial import kinds, masks, perturbations
from aft_jax.adversarial.kinds import GRID, Perturbation
from aft_jax.adversarial.perturbations import PerturbationSpec

ONE = jnp.ones((), jnp.float32)
IMAGES = np.random.default_rng(0).uniform(0.05, 0.95, (6, 9, 12, 2)).astype(np.float32)
LABELS = np.array([0, 1, 1, 0, 0, 0], np.int32)
KERNEL = np.random.default_rng(1).normal(0, 0.1, (9 * 12 * 2, 2)).astype(np.float32)


def linear(images):
    return images.reshape((len(images), -1)) @ KERNEL


def attack(specs, start, steps, images=IMAGES, labels=LABELS, unroll=False):
    objective = perturbations.untargeted(linear, labels)
    return perturbations.joint_attack(objective, images, specs, start, steps=steps, unroll=unroll)


def perturbation(values, size):
    return Perturbation(jnp.asarray(values, jnp.float32), ONE, jnp.full((len(values), 1, 1, 1), size, jnp.float32))


def gradient_of(images, labels):
    """Of the summed cross-entropy of `linear`, by hand; [B, H, W, C]."""
    z = images.reshape(len(images), -1).astype(np.float64) @ KERNEL
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return ((p - np.eye(2)[labels]) @ KERNEL.T.astype(np.float64)).reshape(images.shape)


def test_apply_warps_as_scipy():
    shifts = np.random.default_rng(2).uniform(-2, 2, (1, GRID, GRID, 2)).astype(np.float32)
    warped = np.asarray(perturbations.apply(PerturbationSpec('warp', 2.0), perturbation(shifts, 2.0), IMAGES))
    _, height, width, channels = IMAGES.shape
    points = np.linspace(0, height - 1, GRID), np.linspace(0, width - 1, GRID)
    places = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing='ij'), axis=-1)
    moved = places + scipy.interpolate.RegularGridInterpolator(points, shifts[0])(places)
    for image, result in zip(IMAGES, warped, strict=True):
        for channel in range(channels):
            # Black outside the frame, and half black half a pixel outside.
            framed = np.pad(image[..., channel], 3)
            expected = scipy.ndimage.map_coordinates(framed, moved.transpose(2, 0, 1) + 3, order=1)
            np.testing.assert_allclose(result[..., channel], expected, atol=2e-5)
    assert np.abs(warped - IMAGES).max() > 0.2


def test_apply_without_a_shift_is_no_warp():
    change = perturbation(np.zeros((1, GRID, GRID, 2)), 1.0)
    np.testing.assert_allclose(perturbations.apply(PerturbationSpec('warp', 1.0), change, IMAGES), IMAGES, atol=1e-6)


def test_apply_adds_a_universal_perturbation_and_clips():
    change = perturbation(np.full((1, 9, 12, 2), 0.3), 0.3)
    np.testing.assert_allclose(
        perturbations.apply(PerturbationSpec('linf', 0.3), change, IMAGES), np.minimum(IMAGES + 0.3, 1), atol=1e-6
    )


def test_joint_attack_sets_the_pixels_with_the_largest_summed_gradient():
    steps, each = 3, 4
    sparse = PerturbationSpec('sparse', each)
    begin = perturbations.init(sparse, jax.random.key(0), IMAGES)
    np.testing.assert_array_equal(perturbations.apply(sparse, begin, IMAGES), IMAGES)
    examples, (after,) = attack((sparse,), (begin,), steps)
    expected, taken = IMAGES.copy(), np.zeros((9, 12), bool)
    for _ in range(steps):
        summed = gradient_of(expected, LABELS).sum(axis=0)
        length = np.where(taken, -1, np.abs(summed).sum(axis=-1))
        for index in np.argsort(-length.ravel())[:each]:
            row, column = divmod(index, 12)
            expected[:, row, column] = summed[row, column] > 0
            taken[row, column] = True
    np.testing.assert_allclose(examples, expected, atol=1e-6)
    np.testing.assert_array_equal(after.chosen[0, ..., 0] > 0, taken)
    assert taken.sum() == steps * each


def test_joint_attack_moves_a_warp_along_the_sign_of_its_gradient():
    """A step down the wrong side, or with the sampler's derivative wrong, would not raise the loss like this one."""
    warp = PerturbationSpec('warp', 0.8)
    values = np.random.default_rng(3).uniform(-0.3, 0.3, (1, GRID, GRID, 2)).astype(np.float32)

    def loss(values):
        shown = np.asarray(perturbations.apply(warp, perturbation(values, 0.8), IMAGES)).astype(np.float64)
        z = shown.reshape(len(shown), -1) @ KERNEL
        return float((np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), LABELS]).sum())

    _, (after,) = attack((warp,), (perturbation(values, 0.8),), 1)
    moved = np.asarray(after.values) - values
    np.testing.assert_allclose(np.abs(moved), 0.2, atol=1e-6)
    # Central differences in a few of the shifts, where they are clear of rounding.
    clear = 0
    for place in np.random.default_rng(4).permutation(GRID * GRID * 2)[:20]:
        nudge = np.zeros(GRID * GRID * 2, np.float32)
        nudge[place] = 1e-2
        slope = loss(values + nudge.reshape(values.shape)) - loss(values - nudge.reshape(values.shape))
        if abs(slope) > 2e-4:
            clear += 1
            assert np.sign(moved.ravel()[place]) == np.sign(slope)
    assert clear >= 10


SIZES = {
    'linf': 0.1,
    'l2': 0.7,
    'low_frequency': 0.2,
    'sparse': 3,
    'rectangle': 0.1,
    'region': 0.1,
    'tone': 0.3,
    'blur': 1.5,
    'warp': 1.0,
    'affine': 0.1,
}


@pytest.mark.parametrize('kind', kinds.KINDS)
@pytest.mark.parametrize('universal', [True, False])
def test_joint_attack_stays_within_the_size_and_raises_the_loss(kind, universal):
    size = SIZES[kind]
    chosen = PerturbationSpec(kind, size, universal)
    objective = perturbations.untargeted(linear, LABELS)
    gradient = jax.grad(lambda x: objective(x).sum())(IMAGES)
    begin = perturbations.init(chosen, jax.random.key(5), IMAGES, gradient)
    examples, (after,) = jax.jit(lambda change: attack((chosen,), (change,), 6))(begin)

    def losses(images):
        return -np.log(np.take_along_axis(np.asarray(jax.nn.softmax(linear(images))), LABELS[:, None], 1))[:, 0]

    gain = losses(examples) - losses(perturbations.apply(chosen, begin, IMAGES))
    assert gain.sum() > 0.02 and (universal or gain.min() > -1e-3)
    assert np.min(examples) >= 0 and np.max(examples) <= 1
    values = np.asarray(after.values)
    assert len(values) == (1 if universal else len(IMAGES))
    for value in values:
        match kind:
            case 'linf' | 'warp' | 'low_frequency' | 'tone':
                assert size * 0.99 <= np.abs(value).max() <= size + 1e-6
            case 'affine' | 'blur':  # The best value may lie within the range.
                assert np.abs(value).max() <= size + 1e-6
            case 'l2':
                np.testing.assert_allclose(np.linalg.norm(value), size, rtol=1e-5)
    if kind == 'sparse':
        assert (np.asarray(after.chosen).sum(axis=(1, 2, 3)) == 18).all() and set(np.unique(values)) <= {0.0, 1.0}
    if kind in kinds.PLACED_BY_GRADIENT:
        np.testing.assert_array_equal(after.chosen, begin.chosen)
        covered = (np.asarray(after.chosen) > 0).mean(axis=(1, 2, 3))
        assert (np.abs(covered - size) < 0.04).all()


def test_joint_attack_perturbs_each_image_as_if_it_were_alone():
    """Sparse ones choose pixels by that image alone: |gradient| times the distance to the new value (0 or 1)."""
    steps, each = 2, 3
    sparse = PerturbationSpec('sparse', each, universal=False)
    begin = perturbations.init(sparse, jax.random.key(0), IMAGES)
    examples, _ = attack((sparse,), (begin,), steps)
    expected = IMAGES.copy()
    for index in range(len(IMAGES)):
        taken = np.zeros((9, 12), bool)
        for _ in range(steps):
            gradient = gradient_of(expected[index : index + 1], LABELS[index : index + 1])[0]
            way = np.abs((gradient > 0) - IMAGES[index])
            gain = np.where(taken, -1, (np.abs(gradient) * way).sum(axis=-1))
            for place in np.argsort(-gain.ravel())[:each]:
                row, column = divmod(place, 12)
                expected[index, row, column] = gradient[row, column] > 0
                taken[row, column] = True
    np.testing.assert_allclose(examples, expected, atol=1e-6)
    for kind, size in (('linf', 0.1), ('l2', 0.5), ('warp', 1.0)):
        spec = PerturbationSpec(kind, size, universal=False)
        begin = perturbations.init(spec, jax.random.key(1), IMAGES)
        together, _ = attack((spec,), (begin,), 3)
        first = jax.tree.map(lambda x: x[:1] if x.ndim else x, begin)
        alone, _ = attack((spec,), (first,), 3, IMAGES[:1], LABELS[:1])
        np.testing.assert_allclose(together[:1], alone, atol=1e-5)


def test_joint_attack_gives_each_spec_its_part_of_the_images():
    specs = (PerturbationSpec('linf', 0.1), PerturbationSpec('sparse', 2), PerturbationSpec('l2', 0.5, universal=False))
    begin = perturbations.init_all(specs, jax.random.key(6), IMAGES)
    assert [len(change.values) for change in begin] == [1, 1, 2]
    together, _ = attack(specs, begin, 2)
    for i, part in enumerate((slice(2), slice(2, 4), slice(4, 6))):
        one = slice(i, i + 1)
        alone, _ = attack(specs[one], begin[one], 2, IMAGES[part], LABELS[part])
        np.testing.assert_allclose(together[part], alone, atol=1e-6)


def test_joint_attack_in_a_loop_equals_unrolled_steps():
    specs = (
        PerturbationSpec('linf', 0.1),
        PerturbationSpec('l2', 0.5, False),
        PerturbationSpec('sparse', 2, False),
        PerturbationSpec('warp', 1.0),
    )
    images, labels = jnp.tile(IMAGES, (2, 1, 1, 1)), jnp.tile(LABELS, 2)
    begin = perturbations.init_all(specs, jax.random.key(7), images)

    objective = perturbations.untargeted(linear, labels)

    def trace(unroll):
        attack = partial(perturbations.joint_attack, objective, specs=specs, steps=3, unroll=unroll)
        return jax.jit(attack).trace(images, perturbations=begin)

    looped, unrolled = trace(False), trace(True)
    assert 'scan[' in str(looped.jaxpr) and 'scan[' not in str(unrolled.jaxpr)
    results = [traced.lower().compile()(images, perturbations=begin) for traced in (looped, unrolled)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *results)


@pytest.mark.parametrize('draw', [masks.draw_rectangles, masks.draw_regions])
def test_masks_have_the_area_and_reach_every_pixel(draw):
    areas = np.array([0.02, 0.15], np.float32)
    drawn = np.concatenate([np.asarray(draw(jax.random.key(i), areas, 9, 12)) for i in range(12)], axis=1)
    assert drawn.shape == (2, 12 * masks.PLACES, 9, 12) and set(np.unique(drawn)) == {0.0, 1.0}
    # Sides and counts are rounded to pixels, of which the smaller area has two.
    np.testing.assert_allclose(drawn.mean(axis=(1, 2, 3)), areas, atol=0.01)
    # Every pixel is covered, those of the edges too.
    assert (drawn[1].mean(axis=0) > 0.02).all()


@pytest.mark.parametrize('universal', [True, False])
def test_init_places_a_rectangle_where_its_best_pixels_gain_most(universal):
    """Against a search over the candidates in NumPy."""
    key, gradient = jax.random.key(8), gradient_of(IMAGES, LABELS).astype(np.float32)
    spec = PerturbationSpec('rectangle', 0.12, universal)
    start = perturbations.init(spec, key, IMAGES, jnp.asarray(gradient))
    count = 1 if universal else len(IMAGES)
    candidates = np.asarray(
        masks.draw_rectangles(jax.random.split(key, 3)[0], jnp.full(count, 0.12, jnp.float32), 9, 12)
    )
    for i in range(count):
        members = slice(None) if universal else slice(i, i + 1)
        at_one = (gradient[members] * (1 - IMAGES[members])).sum(axis=0)
        at_zero = (-gradient[members] * IMAGES[members]).sum(axis=0)
        gains = [np.maximum(at_one, at_zero)[mask > 0].sum() / np.sqrt(mask.sum()) for mask in candidates[i]]
        np.testing.assert_array_equal(np.asarray(start.chosen)[i, ..., 0] > 0, candidates[i, int(np.argmax(gains))] > 0)
        # The pattern starts on the better side.
        inside = candidates[i, int(np.argmax(gains))] > 0
        assert ((np.asarray(start.values)[i] > 0.5) == (at_one > at_zero))[inside].all()


def test_apply_blurs_and_rotates_as_scipy():
    blur = perturbation(np.full((1, 1, 1, 1), 0.7), 3.0)
    expected = scipy.ndimage.gaussian_filter(
        np.pad(IMAGES, ((0, 0), (20, 20), (20, 20), (0, 0))), kinds.BLUR_SIGMA, axes=(1, 2), truncate=12
    )[:, 20:-20, 20:-20]
    weight = scipy.ndimage.gaussian_filter(np.pad(np.ones((9, 12)), 20), kinds.BLUR_SIGMA, truncate=12)[
        20:-20, 20:-20, None
    ]
    blurred = IMAGES + 0.7 * (expected / weight - IMAGES)
    np.testing.assert_allclose(perturbations.apply(PerturbationSpec('blur', 3.0), blur, IMAGES), blurred, atol=1e-4)

    angle, scale, down, right = 0.05, -0.1, 0.08, -0.04
    affine = perturbation(np.array([angle, scale, down, right]).reshape(1, 1, 1, 4), 0.15)
    result = np.asarray(perturbations.apply(PerturbationSpec('affine', 0.15), affine, IMAGES))
    turn = (1 + 0.7 * scale) * np.array(
        [[np.cos(3 * angle), -np.sin(3 * angle)], [np.sin(3 * angle), np.cos(3 * angle)]]
    )
    centre = np.array([4.0, 5.5])
    for image, moved in zip(IMAGES, result, strict=True):
        framed = np.pad(image, ((8, 8), (8, 8), (0, 0)))
        shift = centre + 8 - turn @ (centre + 8) + np.array([down * 9, right * 12])
        for channel in range(2):
            expected = scipy.ndimage.affine_transform(framed[..., channel], turn, shift, order=1)
            np.testing.assert_allclose(moved[..., channel], expected[8:-8, 8:-8], atol=2e-4)


def test_apply_changes_tones_as_numpy():
    values = np.array([[0.2, -0.1], [0.1, -0.2], [0.3, 0.05]]).reshape(1, 1, 3, 2)
    expected = np.clip((1 + values[:, :, 1]) * IMAGES ** np.exp(1.5 * values[:, :, 0]) + values[:, :, 2] / 2, 0, 1)
    result = perturbations.apply(PerturbationSpec('tone', 0.6), perturbation(values, 0.6), IMAGES)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_init_draws_sizes_between_the_smallest_and_the_largest():
    spec = perturbations.spec_of_any_size('warp', (9, 12, 2), universal=False)
    assert spec.smallest == pytest.approx(0.015 * 9) and spec.size == pytest.approx(0.08 * 9)
    images = jnp.zeros((400, 9, 12, 2))
    logs = np.log(np.asarray(perturbations.init(spec, jax.random.key(9), images).size).ravel() / spec.smallest)
    largest = np.log(0.08 / 0.015)
    assert 0 <= logs.min() < 0.05 and largest - 0.05 < logs.max() <= largest + 1e-5
    assert logs.mean() == pytest.approx(largest / 2, abs=0.1)
