"""Adversarial perturbations against SciPy's interpolation, and against closed forms on a linear classifier."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.interpolate
import scipy.ndimage

from aft_jax.adversarial import perturbations
from aft_jax.adversarial.perturbations import GRID, Perturbation, PerturbationSpec

ONE = jnp.ones((), jnp.float32)
IMAGES = np.random.default_rng(0).uniform(0.05, 0.95, (6, 9, 12, 2)).astype(np.float32)
LABELS = np.array([0, 1, 1, 0, 0, 0], np.int32)
KERNEL = np.random.default_rng(1).normal(0, 0.1, (9 * 12 * 2, 2)).astype(np.float32)


def linear(images):
    return images.reshape((len(images), -1)) @ KERNEL


def gradient_of(images, labels):
    """Of the summed cross-entropy of `linear`, by hand; [B, H, W, C]."""
    z = images.reshape(len(images), -1).astype(np.float64) @ KERNEL
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return ((p - np.eye(2)[labels]) @ KERNEL.T.astype(np.float64)).reshape(images.shape)


def test_apply_warps_as_scipy():
    shifts = np.random.default_rng(2).uniform(-2, 2, (1, GRID, GRID, 2)).astype(np.float32)
    warped = np.asarray(
        perturbations.apply(PerturbationSpec('warp', 2.0), Perturbation(jnp.asarray(shifts), ONE), IMAGES)
    )
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
    change = Perturbation(jnp.zeros((1, GRID, GRID, 2)), ONE)
    np.testing.assert_allclose(perturbations.apply(PerturbationSpec('warp', 1.0), change, IMAGES), IMAGES, atol=1e-6)


def test_apply_adds_a_universal_perturbation_and_clips():
    change = Perturbation(jnp.full((1, 9, 12, 2), 0.3, jnp.float32), ONE)
    np.testing.assert_allclose(
        perturbations.apply(PerturbationSpec('linf', 0.3), change, IMAGES), np.minimum(IMAGES + 0.3, 1), atol=1e-6
    )


def test_joint_attack_sets_the_pixels_with_the_largest_summed_gradient():
    steps, each = 3, 4
    sparse = PerturbationSpec('sparse', each)
    begin = perturbations.init(sparse, jax.random.key(0), IMAGES.shape)
    np.testing.assert_array_equal(perturbations.apply(sparse, begin, IMAGES), IMAGES)
    examples, (after,) = perturbations.joint_attack(linear, IMAGES, LABELS, (sparse,), (begin,), steps=steps)
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
        shown = np.asarray(perturbations.apply(warp, Perturbation(jnp.asarray(values), ONE), IMAGES)).astype(np.float64)
        z = shown.reshape(len(shown), -1) @ KERNEL
        return float((np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), LABELS]).sum())

    _, (after,) = perturbations.joint_attack(
        linear, IMAGES, LABELS, (warp,), (Perturbation(jnp.asarray(values), ONE),), steps=1
    )
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


@pytest.mark.parametrize('kind', perturbations.KINDS)
@pytest.mark.parametrize('universal', [True, False])
def test_joint_attack_stays_within_the_size_and_raises_the_loss(kind, universal):
    size = {'linf': 0.1, 'l2': 0.7, 'sparse': 3, 'warp': 1.0}[kind]
    chosen = PerturbationSpec(kind, size, universal)
    begin = perturbations.init(chosen, jax.random.key(5), IMAGES.shape)
    examples, (after,) = jax.jit(
        lambda change: perturbations.joint_attack(linear, IMAGES, LABELS, (chosen,), (change,), steps=6)
    )(begin)

    def losses(images):
        return -np.log(np.take_along_axis(np.asarray(jax.nn.softmax(linear(images))), LABELS[:, None], 1))[:, 0]

    gain = losses(examples) - losses(perturbations.apply(chosen, begin, IMAGES))
    assert gain.sum() > 0.05 and (universal or gain.min() > 0.01)
    assert np.min(examples) >= 0 and np.max(examples) <= 1
    values = np.asarray(after.values)
    assert len(values) == (1 if universal else len(IMAGES))
    for value in values:
        match kind:
            case 'linf' | 'warp':
                assert size * 0.99 <= np.abs(value).max() <= size + 1e-6
            case 'l2':
                np.testing.assert_allclose(np.linalg.norm(value), size, rtol=1e-5)
    if kind == 'sparse':
        assert (np.asarray(after.chosen).sum(axis=(1, 2, 3)) == 18).all() and set(np.unique(values)) <= {0.0, 1.0}


def test_joint_attack_perturbs_each_image_as_if_it_were_alone():
    """Sparse ones choose pixels by that image alone: |gradient| times the distance to the new value (0 or 1)."""
    steps, each = 2, 3
    sparse = PerturbationSpec('sparse', each, universal=False)
    begin = perturbations.init(sparse, jax.random.key(0), IMAGES.shape)
    examples, _ = perturbations.joint_attack(linear, IMAGES, LABELS, (sparse,), (begin,), steps=steps)
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
        begin = perturbations.init(spec, jax.random.key(1), IMAGES.shape)
        together, _ = perturbations.joint_attack(linear, IMAGES, LABELS, (spec,), (begin,), steps=3)
        first = jax.tree.map(lambda x: x[:1] if x.ndim else x, begin)
        alone, _ = perturbations.joint_attack(linear, IMAGES[:1], LABELS[:1], (spec,), (first,), steps=3)
        np.testing.assert_allclose(together[:1], alone, atol=1e-5)


def test_joint_attack_gives_each_spec_its_part_of_the_images():
    specs = (PerturbationSpec('linf', 0.1), PerturbationSpec('sparse', 2), PerturbationSpec('l2', 0.5, universal=False))
    begin = perturbations.init_all(specs, jax.random.key(6), IMAGES.shape)
    assert [len(change.values) for change in begin] == [1, 1, 2]
    together, _ = perturbations.joint_attack(linear, IMAGES, LABELS, specs, begin, steps=2)
    for i, part in enumerate((slice(2), slice(2, 4), slice(4, 6))):
        one = slice(i, i + 1)
        alone, _ = perturbations.joint_attack(linear, IMAGES[part], LABELS[part], specs[one], begin[one], steps=2)
        np.testing.assert_allclose(together[part], alone, atol=1e-6)


def test_joint_attack_in_a_loop_equals_unrolled_steps():
    specs = (
        PerturbationSpec('linf', 0.1),
        PerturbationSpec('l2', 0.5, False),
        PerturbationSpec('sparse', 2, False),
        PerturbationSpec('warp', 1.0),
    )
    images, labels = jnp.tile(IMAGES, (2, 1, 1, 1)), jnp.tile(LABELS, 2)
    begin = perturbations.init_all(specs, jax.random.key(7), images.shape)

    class Fast:
        slow_in_loops = False

        def __call__(self, images):
            return linear(images)

    def trace(logits):
        attack = partial(perturbations.joint_attack, logits, specs=specs, steps=3)
        return jax.jit(attack).trace(images, labels, perturbations=begin)

    looped, unrolled = trace(Fast()), trace(linear)
    assert 'scan[' in str(looped.jaxpr) and 'scan[' not in str(unrolled.jaxpr)
    results = [traced.lower().compile()(images, labels, perturbations=begin) for traced in (looped, unrolled)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *results)
