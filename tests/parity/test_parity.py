"""Our samplers, triggers and networks against torch's, which are an independent implementation.

Each test runs twice: on values that torch made earlier (values.npz, written by make_values.py), always; and on values
that it makes now, where it is installed. Agreement is to 1e-5 of the largest value, in float32; a network in training
mode is given 5e-5, and a sharpened mask 1e-4.
"""

import importlib.util
from functools import partial
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from aft_jax.attacks import input_aware, wanet
from aft_jax.models import logits_function
from aft_jax.ops.resampling import sample_field, upsample_bicubic, upsample_bilinear

TOLERANCE = 1e-5
HAS_TORCH = importlib.util.find_spec('torch') is not None
NETWORKS = {'stored': cases.STORED_NETWORKS, 'torch': cases.LIVE_NETWORKS}


@pytest.fixture(
    scope='module',
    params=['stored', pytest.param('torch', marks=pytest.mark.skipif(not HAS_TORCH, reason='torch is not installed'))],
)
def source(request):
    return request.param


@pytest.fixture(scope='module')
def values(source):
    if source == 'torch':
        import torch_reference

        return torch_reference.values(NETWORKS['torch'])
    with np.load(Path(__file__).parent / 'values.npz') as stored:
        return dict(stored)


def assert_agree(actual, expected, tolerance: float = TOLERANCE) -> None:
    assert np.shape(actual) == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1e-3, np.abs(expected).max()))


def as_image(array) -> jax.Array:
    return jnp.asarray(array)


@pytest.mark.parametrize('size', cases.BICUBIC_SIZES)
def test_bicubic_upsampling(values, size):
    h, w, height, width = cases.BICUBIC_SIZES[size]
    assert_agree(upsample_bicubic(cases.uniform(1, (1, h, w, 2), -1, 1), height, width), values[f'bicubic/{size}'])


def test_grid_sample_inside_and_outside_the_frame(values):
    images, field = cases.uniform(2, (3, 9, 12, 2)), cases.uniform(3, (3, 7, 5, 2), -1.3, 1.3)
    assert_agree(sample_field(as_image(images), as_image(field)), values['grid_sample'])


def test_bilinear_doubling(values):
    assert_agree(upsample_bilinear(as_image(cases.uniform(4, (2, 7, 5, 3)))), values['bilinear'])


@pytest.mark.parametrize('shape', cases.WANET_SHAPES)
def test_wanet_trigger_and_noise_mode(values, shape):
    height, width, channels = cases.WANET_SHAPES[shape]
    images = as_image(cases.uniform(5, (2, height, width, channels)))
    grid = cases.uniform(6, (1, 4, 4, 2), -2, 2)[0]
    arrays = {'field': as_image(wanet.warping_field(grid, cases.WANET_STRENGTH, height, width))}
    assert_agree(wanet.warp(arrays, images), values[f'wanet/{shape}'])
    key, _ = cases.wanet_noise((height, width, channels))
    assert_agree(wanet.warp_with_noise(arrays, images, images, key), values[f'wanet_noise/{shape}'])


@pytest.mark.parametrize('shape', cases.IMAGE_SHAPES)
def test_input_aware_trigger(values, shape):
    networks, variables = cases.input_aware(cases.IMAGE_SHAPES[shape])
    images = as_image(cases.uniform(7, (2, *cases.IMAGE_SHAPES[shape])))
    pattern = jax.jit(networks.generator.apply)(variables['generator'], images)
    maps = jax.jit(networks.mask.apply)(variables['mask'], images)
    mask = input_aware.sharpen(maps)
    triggered = jax.jit(partial(input_aware.trigger, networks))(variables, images)
    assert_agree(pattern, values[f'input_aware/{shape}/pattern'])
    assert_agree(maps, values[f'input_aware/{shape}/map'])
    # The mask is up to ten times as steep as the map that it sharpens, and so is its rounding.
    assert_agree(mask, values[f'input_aware/{shape}/mask'], 1e-4)
    assert_agree(triggered, values[f'input_aware/{shape}/triggered'], 1e-4)


@pytest.mark.parametrize('shape', cases.IMAGE_SHAPES)
def test_generator_in_training_mode(values, shape):
    networks, variables = cases.input_aware(cases.IMAGE_SHAPES[shape])
    images = as_image(cases.uniform(9, (8, *cases.IMAGE_SHAPES[shape])))
    train = jax.jit(partial(networks.generator.apply, train=True, mutable=['batch_stats']))
    output, changes = train(variables['generator'], images)
    stats = changes['batch_stats']
    means = np.concatenate([stats[f'BatchNorm_{i}']['mean'] for i in range(len(stats))])
    # Each of up to 16 BatchNorms in a row divides by the deviation of its own batch, which magnifies rounding.
    assert_agree(output[:2], values[f'input_aware/{shape}/training'], 5e-5)
    assert_agree(means, values[f'input_aware/{shape}/means'])


def test_preact_resnet_logits_and_input_gradients(values, source):
    for width, final_norm in NETWORKS[source]:
        case = cases.classifier(width, final_norm)
        model = logits_function(case.module, case.variables)

        def loss(images, model=model, labels=case.labels):
            logits = model(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

        gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(as_image(case.images))
        assert_agree(logits, values[f'preact_resnet/{width}/{final_norm}/logits'])
        assert_agree(gradient, values[f'preact_resnet/{width}/{final_norm}/gradient'])


def test_batch_norm_statistics(values):
    images = as_image(cases.uniform(8, (4, 5, 6, 3), -2, 3))
    layer = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5)
    output, variables = layer.init_with_output(jax.random.key(0), images)
    _, changes = layer.apply(variables, images, mutable=['batch_stats'])
    mean, var = changes['batch_stats']['mean'], changes['batch_stats']['var']
    assert_agree(output, values['batch_norm/output'])
    assert_agree(mean, values['batch_norm/mean'])
    # torch keeps the unbiased variance: n / (n - 1) times ours, on top of 0.9 of the initial 1.
    count = images.size // images.shape[-1]
    assert_agree(0.9 + (var - 0.9) * count / (count - 1), values['batch_norm/var'])


def test_diversity_and_its_gradient(values):
    images, others = (as_image(cases.uniform(seed, (4, 6, 6, 3))) for seed in (31, 32))
    masks, other_masks = (as_image(cases.uniform(seed, (4, 6, 6, 1))) for seed in (33, 34))
    value, gradient = jax.value_and_grad(lambda m: input_aware.diversity(images, others, m, other_masks))(masks)
    assert_agree(value, values['diversity/value'])
    assert_agree(gradient, values['diversity/gradient'])
