"""FP and ANP: what they prune against NumPy, and that it stays pruned."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from defense_runs import as_numpy, lines, record_stages, run_defense, run_twice

from aft_jax import models
from aft_jax.config import resolve
from aft_jax.data.augment import AugmentOptions
from aft_jax.defenses import DefenderData, anp, defender, fp
from aft_jax.defenses.defender import TuningOptions
from aft_jax.errors import UserError
from aft_jax.models.channel_pruning import first_dense, head_inputs, masked_logits, prune_channels
from aft_jax.models.mnist_cnn import MnistCNN
from aft_jax.models.preact_resnet import PreActResNet
from aft_jax.training.optimiser import sgd
from aft_jax.validation import validate


def random_variables(module, shape, seed):
    """Variables of a module drawn by NumPy, with variances and scales that are positive."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), jnp.float32))

    def draw(path, leaf):
        if path[-1].key in ('var', 'scale'):
            return generator.uniform(0.5, 2.0, leaf.shape).astype(np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 10
        return (generator.normal(size=leaf.shape) * np.sqrt(2 / fan_in)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


# 16x16 images make a last map of 2x2 positions and 64 channels, which dense rows mix.
CNN = MnistCNN(num_classes=4)
CNN_VARIABLES = random_variables(CNN, (16, 16, 1), 0)


@pytest.fixture(scope='module')
def held_data(dataset):
    """40 clean images of 16x16, and a random network as the infected model. Pruning changes its accuracy."""
    images = dataset.train_images[:40].repeat(2, axis=1).repeat(2, axis=2)
    return DefenderData(CNN, CNN_VARIABLES, images, dataset.train_labels[:40])


def last_map(module, variables, images):
    """The last feature map, float64, of stored images."""
    apply = jax.jit(partial(module.apply, features=True))
    return np.asarray(apply(variables, images.astype(np.float32) / 255)[1][-1], np.float64)


def cnn_head(variables, feature_map):
    """The logits of MnistCNN from its last feature map on."""
    first, second = (variables['params'][name] for name in ('Dense_0', 'Dense_1'))
    hidden = np.maximum(feature_map.reshape(len(feature_map), -1) @ first['kernel'] + first['bias'], 0)
    return hidden @ second['kernel'] + second['bias']


def test_fp_prunes_as_numpy_and_the_channels_stay_pruned(make_run, config, held_data, monkeypatch):
    """From the feature maps on all is NumPy: the ranking, each candidate's accuracy and the choice."""
    config.tuning.budget = 0.1
    config.fp.update({'epochs': 2, 'learning_rates': (0.02,)})
    training, held = defender.hold_out(held_data, config.tuning.held_out_share, config.seed)
    activities = np.abs(last_map(CNN, CNN_VARIABLES, training.images)).mean(axis=(0, 1, 2))
    order = np.argsort(activities)
    held_map = last_map(CNN, CNN_VARIABLES, held.images)
    accuracies = []
    for count in range(64):
        kept = np.ones(64)
        kept[order[:count]] = 0
        accuracies.append(np.mean(cnn_head(CNN_VARIABLES, held_map * kept).argmax(axis=1) == held.labels))
    count = max(n for n in range(64) if accuracies[n] >= max(accuracies) - 0.1)
    assert 0 < count < 63 and len(set(accuracies)) > 2

    run = make_run()
    purified, trained = run_twice('fp', run, held_data, config, monkeypatch)
    assert list(trained) == ['purify/fp/0.02']
    assert [line['pruned_share'] for line in lines(run)] == [count / 64] * 8  # 32 images, batches of 8, 2 epochs
    kernel = np.asarray(purified.variables['params']['Dense_0']['kernel']).reshape(4, 64, 512)
    before = CNN_VARIABLES['params']['Dense_0']['kernel'].reshape(4, 64, 512)
    assert not kernel[:, order[:count]].any()
    # All other channels are fine-tuned.
    assert np.all(np.any(kernel[:, order[count:]] != before[:, order[count:]], axis=2))


def test_least_active_first_keeps_ties_in_order():
    """Ties keep their order, and one channel is always left."""
    expected = [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    np.testing.assert_array_equal(fp.least_active_first(np.array([0.5, 0.1, 0.5, 0.7])), expected)


def test_prune_channels_and_masked_logits_after_a_batch_norm():
    """The inputs of the head decide: with final_norm, BN, ReLU and the average come after the last map."""
    module = PreActResNet(num_classes=4, width=2, final_norm=True)
    variables = random_variables(module, (16, 16, 1), 1)
    images = np.random.default_rng(2).integers(0, 256, (3, 16, 16, 1), dtype=np.uint8)
    kept = (np.arange(16) % 3 > 0).astype(np.float32)

    name = first_dense(module, variables, (16, 16, 1))

    @jax.jit
    def compute(variables, images):
        pruned = variables | {'params': prune_channels(variables['params'], name, kept)}
        masked = masked_logits(module, name, variables, images, kept)
        return head_inputs(module, name, variables, images), module.apply(pruned, images), masked

    read, *both = compute(variables, images.astype(np.float32) / 255)
    params, statistics = (variables[kind]['final_norm_layer'] for kind in ('params', 'batch_stats'))
    feature_map = last_map(module, variables, images)
    normal = (feature_map - statistics['mean']) / np.sqrt(statistics['var'] + 1e-5) * params['scale'] + params['bias']
    average = np.maximum(normal, 0).mean(axis=(1, 2))
    np.testing.assert_allclose(read, average[:, None], rtol=1e-4, atol=1e-5)
    head = variables['params']['head']
    for logits in both:
        np.testing.assert_allclose(logits, (average * kept) @ head['kernel'] + head['bias'], rtol=1e-4, atol=1e-4)
    assert np.abs(average[:, kept == 0]).max() > 0.1


@pytest.mark.parametrize('name', models.NAMES)
def test_first_dense_of_every_network(config, name):
    """Whose rows are the channels of the last map, at as many positions as the network's head sees."""
    config.model.name, config.model.depth = name, 11 if name == 'vgg_bn' else 18
    module = models.build(resolve(config), 4)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    first = first_dense(module, variables, image.shape[1:])
    read = jax.eval_shape(partial(head_inputs, module, first), variables, image)
    positions, channels = {'mnist_cnn': (16, 64), 'vgg_bn': (49, 512)}.get(name, (1, 512))
    assert read.shape == (1, positions, channels)
    assert len(variables['params'][first]['kernel']) == positions * channels


class NormNet(nn.Module):
    """Dense, BatchNorm, ReLU, dense: small enough to be written down."""

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(5)(images.reshape((len(images), -1)))
        return nn.Dense(3)(nn.relu(nn.BatchNorm(use_running_average=not train)(x)))


def norm_net_loss(variables, images, labels, scales, biases):
    """NormNet's cross-entropy in training mode, float64, its BatchNorm's scale and bias multiplied by these."""
    first, norm, second = (variables['params'][name] for name in ('Dense_0', 'BatchNorm_0', 'Dense_1'))
    x = images.reshape(len(images), -1).astype(np.float64) @ first['kernel'] + first['bias']
    x = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
    x = np.maximum(x * norm['scale'] * scales + norm['bias'] * biases, 0)
    z = x @ second['kernel'] + second['bias']
    return -scipy.special.log_softmax(z, axis=1)[np.arange(len(z)), labels].mean()


def slope(function, at):
    """The gradient of a function of a vector by central differences."""
    steps = 1e-6 * np.eye(len(at))
    return np.array([(function(at + step) - function(at - step)) / 2e-6 for step in steps])


def test_mask_step_equals_numpy_twice(monkeypatch):
    variables = random_variables(NormNet(), (2, 2, 1), 3)
    generator = np.random.default_rng(4)
    images = generator.uniform(size=(16, 2, 2, 1)).astype(np.float32)
    labels = generator.integers(0, 3, 16).astype(np.int32)
    start = generator.uniform(-0.4, 0.4, (2, 5)).astype(np.float32)
    name = 'BatchNorm_0'
    monkeypatch.setattr(anp, 'random_noise', lambda *_: anp.Noise({name: start[0]}, {name: start[1]}))
    optimiser = sgd(0.5, 'constant', 2, momentum=0.9, weight_decay=0.0)
    options = anp.AnpOptions(iterations=2, eps=0.4, clean_weight=0.2, learning_rate=0.5)
    step = jax.jit(
        partial(
            anp.mask_step,
            module=NormNet(),
            optimiser=optimiser,
            options=options,
            augmentation=AugmentOptions(crop=0, flip=False, rotation=0.0),
        )
    )
    batch = {'images': images, 'labels': labels, 'constants': variables}
    state = anp.init_masks(variables, optimiser)
    loss = partial(norm_net_loss, variables, images, labels)
    masks, travelled = np.ones(5), np.zeros(5)
    for _ in range(2):
        scale_slope = slope(lambda d, m=masks: loss(m + d, 1 + start[1]), start[0].astype(np.float64))
        bias_slope = slope(lambda e, m=masks: loss(m + start[0], 1 + e), start[1].astype(np.float64))
        assert min(np.abs(scale_slope).min(), np.abs(bias_slope).min()) > 1e-5  # no sign is left to rounding
        d = np.clip(start[0] + 0.4 * np.sign(scale_slope), -0.4, 0.4)
        e = np.clip(start[1] + 0.4 * np.sign(bias_slope), -0.4, 0.4)
        clean, noisy = loss(masks, 1.0), loss(masks + d, 1 + e)
        assert noisy > clean + 0.01
        gradient = slope(lambda m, d=d, e=e: 0.2 * loss(m, 1.0) + 0.8 * loss(m + d, 1 + e), masks)
        travelled = 0.9 * travelled - 0.5 * gradient
        masks = np.clip(masks + travelled, 0, 1)
        state, metrics = step(state, batch, jax.random.key(0))
        np.testing.assert_allclose(state.masks[name], masks, atol=2e-5)
        np.testing.assert_allclose([metrics['clean_loss'], metrics['noisy_loss']], [clean, noisy], atol=1e-5)
        np.testing.assert_allclose(metrics['loss'], 0.2 * clean + 0.8 * noisy, atol=1e-5)
        np.testing.assert_allclose(metrics['mask'], masks.mean(), atol=1e-5)
    assert int(state.step) == 2
    assert masks.max() == 1 and masks.min() < 0.97  # some are cut, some move


def test_random_noise_is_uniform_in_the_budget():
    masks = {'a': np.ones(2000, np.float32), 'b': np.ones(2000, np.float32)}
    parts = [part for noise in anp.random_noise(jax.random.key(0), masks, 0.4) for part in noise.values()]
    for part in parts:
        assert part.min() >= -0.4 and part.max() <= 0.4
        np.testing.assert_allclose([part.mean(), part.std()], [0, 0.8 / np.sqrt(12)], atol=0.02)
    assert np.abs(np.corrcoef(parts) - np.eye(4)).max() < 0.1


def test_prune_sets_scales_to_zero_and_leaves_the_rest():
    variables = random_variables(PreActResNet(num_classes=4, width=2), (8, 8, 1), 0)
    norm = 'stage2_block1/BatchNorm_1'
    masks = {norm: np.array([0.2, 0.3, 0.4, 0.1], np.float32), 'stage1_block1/BatchNorm_0': np.ones(2, np.float32)}
    scale = variables['params']['stage2_block1']['BatchNorm_1']['scale']
    pruned = anp.prune(variables, masks, 0.3)
    pruned_scale = pruned['params']['stage2_block1']['BatchNorm_1'].pop('scale')
    np.testing.assert_array_equal(pruned_scale, scale * np.array([0, 1, 1, 0], np.float32))
    del variables['params']['stage2_block1']['BatchNorm_1']['scale']
    jax.tree.map(np.testing.assert_array_equal, pruned, variables)


class PlantedNet(nn.Module):
    """The brightness of the quarters and of one pixel, normalised, then a dense layer."""

    @nn.compact
    def __call__(self, images, train=False):
        quarters = images.reshape((-1, 2, 4, 2, 4)).mean(axis=(2, 4)).reshape((-1, 4))
        pixel = images[:, 7, 7] - quarters[:, 3:]
        x = nn.BatchNorm(use_running_average=not train)(jnp.concatenate([quarters, pixel], axis=1))
        return nn.Dense(4)(nn.relu(x))


TARGET = 0


@pytest.fixture(scope='module')
def planted(dataset):
    """A perfect classifier with a fifth channel that a bright pixel activates and that votes for the target label."""
    images = dataset.train_images.astype(np.float32) / 255
    quarters = images.reshape(-1, 2, 4, 2, 4).mean(axis=(2, 4)).reshape(-1, 4)
    inputs = np.concatenate([quarters, images[:, 7, 7] - quarters[:, 3:]], axis=1)
    kernel = 4 * np.eye(5, 4, dtype=np.float32)
    kernel[4, TARGET] = 40
    bias = np.array([0, 0, 0, 0, -2], np.float32)
    variables = {
        'params': {
            'BatchNorm_0': {'scale': np.ones(5, np.float32), 'bias': bias},
            'Dense_0': {'kernel': kernel, 'bias': -np.eye(4, dtype=np.float32)[TARGET]},
        },
        'batch_stats': {'BatchNorm_0': {'mean': inputs.mean(axis=0), 'var': inputs.var(axis=0)}},
    }
    return DefenderData(PlantedNet(), variables, dataset.train_images, dataset.train_labels)


def test_anp_prunes_the_planted_channel_alone(make_run, config, planted, dataset, monkeypatch):
    config.anp.iterations = 60
    run = make_run()
    purified, _ = run_twice('anp', run, planted, config, monkeypatch)
    before, after = planted.variables, purified.variables
    np.testing.assert_array_equal(after['params']['BatchNorm_0']['scale'], [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(after['params']['BatchNorm_0']['bias'], before['params']['BatchNorm_0']['bias'])
    triggered = dataset.test_images.copy()
    triggered[:, 7, 7] = 255
    for images, expected in ((dataset.test_images, 1.0), (triggered, pytest.approx(0.25, abs=0.1))):
        classes = [PlantedNet().apply(v, images.astype(np.float32) / 255).argmax(axis=1) for v in (before, after)]
        assert [np.mean(c == dataset.test_labels) for c in classes] == [expected, 1.0]
    masks = [line['mask'] for line in lines(run) if line['stage'] == 'purify/anp']
    assert len(masks) == 60 and masks[-1] < masks[0]
    (pruned,) = (line for line in lines(run) if line['stage'] == 'purify/anp/pruned')  # of the second start too
    assert pruned['pruned_share'] == 0.2 and pruned['held_out_accuracy'] == 1.0


def test_prune_strongest_takes_the_highest_threshold_within_the_budget(make_run, planted):
    """Any quarter's channel is needed; the planted one, of mask 0.47, is not."""
    masks = {'BatchNorm_0': np.array([0.72, 0.97, 0.97, 0.97, 0.47], np.float32)}
    for budget, threshold, scale in ((0.02, 0.7, [1, 1, 1, 1, 0]), (0.3, 0.95, [0, 1, 1, 1, 0])):
        variables, record, _ = anp.prune_strongest(make_run(), planted, masks, TuningOptions(0.2, budget))
        assert record['threshold'] == threshold
        np.testing.assert_array_equal(variables['params']['BatchNorm_0']['scale'], scale)
        assert record['held_out_accuracy'] == pytest.approx(np.mean(scale[:4]), abs=0.01)


def test_anp_keeps_the_masks_of_a_real_network_between_0_and_1(make_run, config, held_data, monkeypatch):
    """The learning rate moves masks far beyond both ends."""
    config.anp.update({'iterations': 4, 'learning_rate': 50.0})
    recorded = record_stages(monkeypatch)
    purified = run_defense('anp', make_run(devices=1), held_data, config)
    masks = recorded['purify/anp'].fitted.state.masks
    assert {norm: len(mask) for norm, mask in masks.items()} == {'BatchNorm_0': 32, 'BatchNorm_1': 64}
    values = np.concatenate(list(as_numpy(masks).values()))
    assert values.min() == 0 and values.max() == 1
    for norm in ('BatchNorm_0', 'BatchNorm_1'):
        scale = purified.variables['params'][norm]['scale']
        assert np.all((scale == 0) | (scale == CNN_VARIABLES['params'][norm]['scale']))
    jax.tree.map(np.testing.assert_array_equal, purified.variables['batch_stats'], CNN_VARIABLES['batch_stats'])


@pytest.mark.parametrize(
    ('field', 'value', 'sentence'),
    [
        ('fp.epochs', 0, 'fp.epochs=0 must be positive'),
        ('fp.learning_rates', (-0.1,), 'must be positive numbers that rise'),
        ('fp.schedule', 'step', "fp.schedule='step' does not exist; choose one of constant, cosine"),
        ('anp.iterations', 0, 'anp.iterations=0 must be positive'),
        ('anp.learning_rate', 0.0, 'anp.learning_rate=0.0 must be positive'),
        ('anp.eps', 0.0, 'anp.eps=0.0 is a share: above 0'),
        ('anp.eps', 40.0, 'anp.eps=40.0 is a share'),
        ('anp.clean_weight', 1.5, 'anp.clean_weight=1.5 is a share'),
    ],
)
def test_validate_names_wrong_values(config, field, value, sentence):
    validate(config)
    section, name = field.split('.')
    config[section][name] = value
    with pytest.raises(UserError, match=sentence):
        validate(config)
