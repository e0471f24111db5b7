"""The classifiers against NumPy: layers, whole forward passes, parameter counts, and the effects of training mode."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from aft_jax import models
from aft_jax.models.layers import adaptive_average_pool, conv, max_pool
from aft_jax.models.mnist_cnn import MnistCNN
from aft_jax.models.preact_resnet import PreActResNet

MNIST_SHAPE, SMALL_SHAPE = (28, 28, 1), (8, 8, 3)


def build(config, name, num_classes=10, **options):
    config.model.name = name
    config.model.update(options)
    return models.build(config, num_classes)


def random_variables(module, shape, seed=0):
    """Draws variables without trivial values: no zero bias, no unit scale, no fresh statistics."""
    generator = np.random.default_rng(seed)
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape)))

    def draw(path, leaf):
        kind = path[-1].key
        if kind in ('scale', 'var'):
            return generator.uniform(0.5, 2, leaf.shape).astype(np.float32)
        return generator.normal(0, 0.3, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def random_images(count, shape, seed=1):
    return np.random.default_rng(seed).random((count, *shape)).astype(np.float32)


def count_parameters(module, shape):
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape)))
    return sum(leaf.size for leaf in jax.tree.leaves(abstract['params']))


class Reference:
    """The networks in NumPy, float64, evaluation mode."""

    def __init__(self, variables, mean, std):
        self.params, self.stats, self.mean, self.std = variables['params'], variables['batch_stats'], mean, std

    def mnist_cnn(self, images):
        p, s = self.params, self.stats
        x = relu(convolve((images - self.mean) / self.std, p['Conv_0'], 2))
        for i in (0, 1):
            x = convolve(relu(batch_norm(x, p[f'BatchNorm_{i}'], s[f'BatchNorm_{i}'])), p[f'Conv_{i + 1}'], 2)
        x = relu(dense(x.reshape(len(x), -1), p['Dense_0']))
        return dense(x, p['Dense_1'])

    def preact_resnet18(self, images):
        x = convolve((images - self.mean) / self.std, self.params['stem'], 1)
        for stage in (1, 2, 3, 4):
            x = self.block(x, f'stage{stage}_block1', 1 if stage == 1 else 2)
            x = self.block(x, f'stage{stage}_block2', 1)
        return dense(x.mean(axis=(1, 2)), self.params['head'])

    def block(self, x, name, stride):
        p, s = self.params[name], self.stats[name]
        y = relu(batch_norm(x, p['BatchNorm_0'], s['BatchNorm_0']))
        shortcut = convolve(y, p['shortcut'], stride) if stride == 2 else x
        y = convolve(y, p['Conv_0'], stride)
        return shortcut + convolve(relu(batch_norm(y, p['BatchNorm_1'], s['BatchNorm_1'])), p['Conv_1'], 1)


def relu(x):
    return np.maximum(x, 0)


def dense(x, p):
    return x @ p['kernel'].astype(np.float64) + p['bias']


def batch_norm(x, p, s):
    return (x - s['mean']) / np.sqrt(s['var'] + 1e-5) * p['scale'] + p['bias']


def convolve(x, p, stride):
    """Computes a cross-correlation with torch's padding of (k - 1) // 2 on every side."""
    kernel = p['kernel'].astype(np.float64)
    size = kernel.shape[0]
    margin = (size - 1) // 2
    padded = np.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum('bhwcij,ijco->bhwo', windows, kernel) + p.get('bias', 0.0)


@pytest.mark.parametrize('size', [7, 8])
@pytest.mark.parametrize(('kernel', 'stride'), [(3, 1), (3, 2), (1, 2)])
def test_conv_is_padded_as_in_torch(size, kernel, stride):
    image = np.random.default_rng(0).random((size, size)).astype(np.float32)
    weights = np.random.default_rng(1).normal(size=(kernel, kernel)).astype(np.float32)
    layer = conv(1, kernel, stride, dtype=jnp.float32, use_bias=False)
    actual = layer.apply({'params': {'kernel': weights[:, :, None, None]}}, image[None, :, :, None])
    expected = scipy.signal.correlate2d(image, weights, mode='same')[::stride, ::stride]
    np.testing.assert_allclose(actual[0, :, :, 0], expected, atol=1e-5)


def test_mnist_cnn_equals_numpy(config):
    module = build(config, 'mnist_cnn', mean=(0.3,), std=(0.2,))
    variables, images = random_variables(module, MNIST_SHAPE), random_images(3, MNIST_SHAPE)
    expected = Reference(variables, 0.3, 0.2).mnist_cnn(images)
    actual = jax.jit(module.apply)(variables, images)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_preact_resnet_equals_numpy_and_has_no_final_norm(config):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    module = build(config, 'preact_resnet', width=4, mean=mean, std=std)
    variables, images = random_variables(module, SMALL_SHAPE), random_images(3, SMALL_SHAPE)
    expected = Reference(variables, np.array(mean), np.array(std)).preact_resnet18(images)
    actual = jax.jit(module.apply)(variables, images)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_preact_resnet_final_norm_is_batch_norm_and_relu_before_the_pooling(config):
    module = build(config, 'preact_resnet', width=4, final_norm=True)
    variables, images = random_variables(module, SMALL_SHAPE), random_images(3, SMALL_SHAPE)
    logits, stages = jax.jit(lambda v, x: module.apply(v, x, features=True))(variables, images)
    name = 'final_norm_layer'
    last = batch_norm(np.asarray(stages[-1]), variables['params'][name], variables['batch_stats'][name])
    expected = dense(relu(last).mean(axis=(1, 2)), variables['params']['head'])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    plain = build(config, 'preact_resnet', width=4, final_norm=False)
    assert count_parameters(module, SMALL_SHAPE) - count_parameters(plain, SMALL_SHAPE) == 2 * 8 * 4


# Layer by layer, by hand; a convolution k x k from a to b channels has k^2 a b, a BatchNorm 2 a, a dense a b + b.
PREACT_18 = (
    9 * 3 * 64
    + 2 * (2 * 128 + 2 * 9 * 64 * 64)
    + (128 + 9 * 64 * 128 + 256 + 9 * 128 * 128 + 64 * 128) + (2 * 256 + 2 * 9 * 128 * 128)
    + (256 + 9 * 128 * 256 + 512 + 9 * 256 * 256 + 128 * 256) + (2 * 512 + 2 * 9 * 256 * 256)
    + (512 + 9 * 256 * 512 + 1024 + 9 * 512 * 512 + 256 * 512) + (2 * 1024 + 2 * 9 * 512 * 512)
    + 512 * 10 + 10
)  # fmt: skip
PREACT_34 = PREACT_18 + (
    1 * (2 * 128 + 2 * 9 * 64 * 64)
    + 2 * (2 * 256 + 2 * 9 * 128 * 128)
    + 4 * (2 * 512 + 2 * 9 * 256 * 256)
    + 1 * (2 * 1024 + 2 * 9 * 512 * 512)
)
# Stage by stage: the first block with its shortcut, and the others.
PREACT_50 = 9 * 3 * 64 + 74112 + 2 * 70400 + 377856 + 3 * 280064 + 1509376 + 5 * 1117184 + 6033408 + 2 * 4462592 + 20490
MNIST_CNN = (9 * 32 + 32) + 64 + (9 * 32 * 64 + 64) + 128 + (9 * 64 * 64 + 64) + (4 * 4 * 64 * 512 + 512) + 5130


@pytest.mark.parametrize(
    ('name', 'depth', 'shape', 'expected', 'total'),
    [
        ('preact_resnet', 18, (32, 32, 3), PREACT_18, 11_171_146),
        ('preact_resnet', 34, (32, 32, 3), PREACT_34, 21_279_306),
        ('preact_resnet', 50, (32, 32, 3), PREACT_50, 23_509_066),
        ('mnist_cnn', 18, MNIST_SHAPE, MNIST_CNN, 585_866),
    ],
)
def test_parameter_counts(config, name, depth, shape, expected, total):
    assert count_parameters(build(config, name, depth=depth), shape) == expected == total


@pytest.mark.parametrize(
    ('name', 'depth', 'total'),
    [
        ('resnet', 18, 11_689_512),
        ('resnet', 34, 21_797_672),
        ('resnet', 50, 25_557_032),
        ('vgg_bn', 11, 132_868_840),
        ('vgg_bn', 13, 133_053_736),
        ('vgg_bn', 16, 138_365_992),
        ('vgg_bn', 19, 143_678_248),
    ],
)
def test_parameter_counts_equal_those_of_torchvision(config, name, depth, total):
    module = build(config, name, num_classes=1000, depth=depth, stem='imagenet')
    assert count_parameters(module, (64, 64, 3)) == total


def test_resnet_stem_for_large_images_has_two_strides(config):
    module = build(config, 'resnet', width=4, stem='imagenet')
    _, stages = jax.eval_shape(
        lambda x: module.init_with_output(jax.random.key(0), x, features=True), np.zeros((2, 65, 64, 3), 'f')
    )[0]
    assert [stage.shape[1:3] for stage in stages] == [(17, 16), (9, 8), (5, 4), (3, 2)]


@pytest.mark.parametrize('name', ['resnet', 'vgg_bn'])
def test_apply_in_training_mode_changes_every_statistic(config, name):
    module = build(config, name, width=2, depth=18 if name == 'resnet' else 11, hidden=4)
    variables, images = random_variables(module, (32, 32, 3)), random_images(2, (32, 32, 3))
    train = jax.jit(partial(module.apply, train=True, mutable=['batch_stats'], rngs={'dropout': jax.random.key(0)}))
    _, changes = train(variables, images)
    for before, after in zip(jax.tree.leaves(variables['batch_stats']), jax.tree.leaves(changes), strict=True):
        assert np.isfinite(after).all() and not np.array_equal(before, after)


@pytest.mark.parametrize(('size', 'stride', 'margin'), [(2, 2, 0), (3, 2, 1)])
@pytest.mark.parametrize('side', [7, 8])
def test_max_pool(side, size, stride, margin):
    maps = np.random.default_rng(0).normal(size=(2, side, side + 1, 3)).astype(np.float32)
    padded = np.pad(maps, ((0, 0), (margin, margin), (margin, margin), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    np.testing.assert_array_equal(max_pool(jnp.asarray(maps), size, stride, margin), windows.max(axis=(4, 5)))
    # Each pixel's gradient is the number of windows whose maximum it is.
    gradient = jax.grad(lambda x: max_pool(x, size, stride, margin).sum())(jnp.asarray(maps))
    largest = windows.max(axis=(4, 5))
    expected = np.array([[(largest[i] == value).sum() for value in maps[i].ravel()] for i in range(2)])
    np.testing.assert_array_equal(np.asarray(gradient).reshape(2, -1), expected)


def test_max_pool_rejects_maps_that_are_too_small():
    with pytest.raises(ValueError, match='maps of 1x5 are too small for a pool of 2x2'):
        max_pool(jnp.zeros((1, 1, 5, 2)), 2, 2, 0)


@pytest.mark.parametrize('shape', [(1, 1), (7, 7), (5, 10)])
def test_adaptive_average_pool(shape):
    maps = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)
    expected = np.empty((2, 7, 7, 3))
    for i in range(7):
        for j in range(7):
            rows, columns = (slice(k * n // 7, -((k + 1) * n // -7)) for k, n in ((i, shape[0]), (j, shape[1])))
            expected[:, i, j] = maps[:, rows, columns].mean(axis=(1, 2), dtype=np.float64)
    np.testing.assert_allclose(adaptive_average_pool(jnp.asarray(maps), 7), expected, atol=1e-6)


def test_module_defaults_are_those_of_the_papers():
    assert count_parameters(PreActResNet(10), (32, 32, 3)) == PREACT_18
    assert count_parameters(MnistCNN(10), MNIST_SHAPE) == MNIST_CNN


@pytest.mark.parametrize(
    ('dtype', 'name', 'depth', 'shape', 'maps'),
    [
        ('float32', 'mnist_cnn', 18, MNIST_SHAPE, [(14, 14, 32), (7, 7, 64), (4, 4, 64)]),
        ('bfloat16', 'mnist_cnn', 18, MNIST_SHAPE, [(14, 14, 32), (7, 7, 64), (4, 4, 64)]),
        ('bfloat16', 'preact_resnet', 18, (32, 32, 3), [(32, 32, 8), (16, 16, 16), (8, 8, 32), (4, 4, 64)]),
        ('float32', 'preact_resnet', 50, (32, 32, 3), [(32, 32, 32), (16, 16, 64), (8, 8, 128), (4, 4, 256)]),
        ('float32', 'resnet', 18, (32, 32, 3), [(32, 32, 8), (16, 16, 16), (8, 8, 32), (4, 4, 64)]),
        ('bfloat16', 'resnet', 50, (32, 32, 3), [(32, 32, 32), (16, 16, 64), (8, 8, 128), (4, 4, 256)]),
        ('bfloat16', 'vgg_bn', 11, (47, 40, 3), [(47, 40, 8), (23, 20, 16), (11, 10, 32), (5, 5, 64), (2, 2, 64)]),
    ],
)
def test_build_shapes_and_dtypes(config, dtype, name, depth, shape, maps):
    """Parameters, statistics and logits are float32 for every dtype of the computation."""
    config.dtype = dtype
    module = build(config, name, num_classes=7, depth=depth, width=8)

    def initialise_and_apply(images):
        variables = module.init(jax.random.key(0), images)
        return variables, *module.apply(variables, images, features=True)

    variables, logits, block_outputs = jax.eval_shape(initialise_and_apply, jnp.zeros((5, *shape)))
    assert logits.shape == (5, 7) and logits.dtype == jnp.float32
    assert [output.shape for output in block_outputs] == [(5, *m) for m in maps]
    assert {output.dtype for output in block_outputs} == {jnp.dtype(dtype)}
    assert set(variables) == {'params', 'batch_stats'}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}


@pytest.mark.parametrize('name', ['mnist_cnn', 'preact_resnet'])
def test_apply_in_bfloat16_is_near_float32(config, name):
    module = build(config, name, width=4)
    variables, images = random_variables(module, SMALL_SHAPE), random_images(4, SMALL_SHAPE)
    exact = np.asarray(jax.jit(module.apply)(variables, images))
    config.dtype = 'bfloat16'
    rough = np.asarray(jax.jit(build(config, name).apply)(variables, images))
    assert not np.array_equal(rough, exact)
    np.testing.assert_allclose(rough, exact, atol=0.05 * np.abs(exact).max())


@pytest.mark.parametrize(
    ('name', 'mean', 'std'),
    [('mnist_cnn', (0.4,), (0.2,)), ('preact_resnet', (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))],
)
def test_apply_normalises_images(config, name, mean, std):
    module = build(config, name, width=4, mean=mean, std=std)
    bare = build(config, name, width=4, mean=(0.0,), std=(1.0,))
    variables, images = random_variables(module, SMALL_SHAPE), random_images(4, SMALL_SHAPE)
    normalised = (images - np.array(mean, np.float32)) / np.array(std, np.float32)
    expected = jax.jit(bare.apply)(variables, normalised)
    np.testing.assert_allclose(jax.jit(module.apply)(variables, images), expected, rtol=1e-4, atol=1e-3)


def test_apply_uses_dropout_and_batch_statistics_only_in_training(config):
    module = build(config, 'mnist_cnn', dropout=0.5)
    variables = models.initialise(module, jax.random.key(0), MNIST_SHAPE)
    images = random_images(6, MNIST_SHAPE)

    @partial(jax.jit, static_argnames='train')
    def run(seed, train):
        rngs = {'dropout': jax.random.key(seed)}
        return module.apply(variables, images, train=train, features=True, mutable=['batch_stats'], rngs=rngs)

    (first, stages), changed = run(0, train=True)
    (second, _), _ = run(1, train=True)
    assert not np.allclose(first, second)
    (third, _), unchanged = run(0, train=False)
    (fourth, _), _ = run(1, train=False)
    np.testing.assert_array_equal(third, fourth)
    np.testing.assert_allclose(third, jax.jit(models.logits_function(module, variables))(images), atol=1e-5)
    for before, after in zip(jax.tree.leaves(variables['batch_stats']), jax.tree.leaves(unchanged), strict=True):
        np.testing.assert_array_equal(before, after)
    # A tenth of the batch's mean and (biased) variance replaces a tenth of the old ones, which were 0 and 1.
    statistics = changed['batch_stats']['BatchNorm_0']
    first_maps = np.asarray(stages[0], np.float64)
    np.testing.assert_allclose(statistics['mean'], 0.1 * first_maps.mean(axis=(0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(statistics['var'], 0.9 + 0.1 * first_maps.var(axis=(0, 1, 2)), atol=1e-5)


def test_dropout_keeps_its_share_and_the_mean(config):
    """Of 512 units a share of 0.3 becomes 0 and the others grow by 1 / 0.7; the head adds them up."""
    module = build(config, 'mnist_cnn', num_classes=1, dropout=0.3)
    variables = jax.tree.map(np.zeros_like, random_variables(module, MNIST_SHAPE))
    variables['params']['Dense_0']['bias'] += 1  # every unit is 1 before dropout
    variables['params']['Dense_1']['kernel'] += 1
    images = random_images(40, MNIST_SHAPE)
    train = jax.jit(partial(module.apply, train=True, mutable=['batch_stats']))
    sums, _ = train(variables, images, rngs={'dropout': jax.random.key(0)})
    kept = np.asarray(sums) * 0.7
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-2)
    assert abs(kept.mean() / 512 - 0.7) < 0.02 and kept.std() > 1
    np.testing.assert_allclose(jax.jit(module.apply)(variables, images), 512)
