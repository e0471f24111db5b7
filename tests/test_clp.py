"""CLP: which layers belong together, the bounds against a singular value decomposition, and what is pruned."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from defense_runs import as_numpy, lines, run_defense
from flax.traverse_util import flatten_dict
from test_pruning import random_variables

from aft_jax.defenses import DefenderData, clp
from aft_jax.errors import UserError
from aft_jax.models.mnist_cnn import MnistCNN
from aft_jax.models.norm_pairs import NormPair, find_pairs
from aft_jax.models.preact_resnet import PreActResNet
from aft_jax.models.resnet import ResNet
from aft_jax.models.vgg_bn import VGG
from aft_jax.validation import validate


class Tangled(nn.Module):
    """Layers that are built in one order and called in another, with a pooling, a sum and a norm of the image."""

    def setup(self):
        self.first_norm, self.late_norm, self.sum_norm, self.image_norm = (
            nn.BatchNorm(use_running_average=True, epsilon=e) for e in (1e-5, 1e-3, 1e-5, 1e-5)
        )
        self.second, self.first = nn.Conv(3, (3, 3)), nn.Conv(3, (3, 3))
        self.dense_norm, self.head, self.dense = nn.BatchNorm(use_running_average=True), nn.Dense(2), nn.Dense(6)

    def __call__(self, images, train=False):
        x = self.first_norm(nn.max_pool(nn.relu(self.first(self.image_norm(images))), (2, 2), (2, 2)))
        y = self.second(x)
        x = self.sum_norm(self.late_norm(nn.gelu(y)) + y)
        return self.head(self.dense_norm(self.dense(x.mean(axis=(1, 2)))))


@pytest.mark.parametrize(
    ('module', 'expected'),
    [
        (MnistCNN(num_classes=4), {'BatchNorm_0': 'Conv_0', 'BatchNorm_1': 'Conv_1'}),
        (
            VGG(num_classes=4, depth=11, width=2, hidden=4),
            {
                f'stage{s}_norm{i}': f'stage{s}_conv{i}'
                for s, n in enumerate((1, 1, 2, 2, 2), 1)
                for i in range(1, n + 1)
            },
        ),
        (Tangled(), {'first_norm': 'first', 'late_norm': 'second', 'dense_norm': 'dense'}),
        (nn.Dense(4), {}),
    ],
)
def test_find_pairs_follows_the_data(module, expected):
    shape = (32, 32, 1)
    variables = module.init(jax.random.key(0), np.zeros((1, *shape), np.float32))
    pairs = find_pairs(module, variables, shape)
    assert {'/'.join(pair.norm): '/'.join(pair.layer) for pair in pairs} == expected
    if isinstance(module, Tangled):
        assert [pair.epsilon for pair in pairs if pair.norm == ('late_norm',)] == [1e-3]


@pytest.mark.parametrize(('depth', 'dtype'), [(18, jnp.bfloat16), (50, jnp.float32)])
def test_find_pairs_in_residual_networks(depth, dtype):
    """After activation every convolution has its norm; before it, all but the norms of sums have one."""
    inner = 1 if depth == 18 else 2
    for module in (
        ResNet(4, depth=depth, width=2, stem='cifar', dtype=dtype),
        PreActResNet(4, depth=depth, width=2, dtype=dtype, final_norm=True),
    ):
        variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
        variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables)
        pairs = {pair.norm: pair.layer for pair in find_pairs(module, variables, (16, 16, 1))}
        norms = {path[:-1] for path in flatten_dict(variables['batch_stats'])}
        if isinstance(module, ResNet):
            assert pairs.keys() == norms
            for norm, layer in pairs.items():
                assert layer == tuple(n.replace('BatchNorm', 'Conv').removesuffix('_norm') for n in norm)
        else:
            first = ('stage1_block1', 'BatchNorm_0')
            assert pairs.pop(first) == ('stem',)
            sums = {norm for norm in norms if norm[-1] == 'BatchNorm_0' or norm[0] == 'final_norm_layer'}
            assert pairs.keys() == norms - sums and len(pairs) == inner * (len(sums) - 1)
            for (block, norm), layer in pairs.items():
                assert layer == (block, f'Conv_{int(norm[-1]) - 1}')


def test_lipschitz_bounds_equal_a_singular_value_decomposition():
    module, shape = MnistCNN(num_classes=4), (16, 16, 1)
    variables = random_variables(module, shape, 0)
    bounds = clp.lipschitz_bounds(variables, find_pairs(module, variables, shape))
    params, statistics = variables['params'], variables['batch_stats']
    for i in range(2):
        kernel, norm = params[f'Conv_{i}']['kernel'], f'BatchNorm_{i}'
        for k, actual in enumerate(bounds[norm,]):
            matrix = np.array(
                [[kernel[y, x, c, k] for y in range(3) for x in range(3)] for c in range(kernel.shape[2])]
            )
            largest = scipy.linalg.svdvals(matrix.astype(np.float64))[0]
            gain = params[norm]['scale'][k] / np.sqrt(statistics[norm]['var'][k] + 1e-5)
            np.testing.assert_allclose(actual, largest * gain, rtol=1e-5)


def test_lipschitz_bounds_limit_what_a_channel_of_a_dense_layer_amplifies():
    """The gain of a unit is the largest change of the normalised output for a change of its inputs of length one."""
    module = Tangled()
    variables = random_variables(module, (8, 8, 1), 1)
    bounds = clp.lipschitz_bounds(variables, [NormPair(('dense',), ('dense_norm',), 1e-5)])
    kernel, norm = variables['params']['dense']['kernel'], variables['params']['dense_norm']
    gain = norm['scale'] / np.sqrt(variables['batch_stats']['dense_norm']['var'] + 1e-5)
    expected = np.linalg.norm(kernel * gain, axis=0)
    np.testing.assert_allclose(bounds['dense_norm',], expected, rtol=1e-5)


@pytest.fixture(scope='module')
def amplifier(dataset):
    """A random network in which one channel of the first norm has a gain far above the others."""
    module = MnistCNN(num_classes=4)
    variables = random_variables(module, (16, 16, 1), 2)
    variables['params']['BatchNorm_0']['scale'][7] = 40
    images = dataset.train_images[:24].repeat(2, axis=1).repeat(2, axis=2)
    return DefenderData(module, variables, images, dataset.train_labels[:24])


def test_purify_prunes_the_amplifying_channel_without_data(make_run, config, amplifier):
    """Images and labels that belong to nothing make no difference; a second start comes to the same model."""
    run = make_run()
    infected = as_numpy(amplifier.variables)
    purified = run_defense('clp', run, amplifier, config)
    jax.tree.map(np.testing.assert_array_equal, as_numpy(amplifier.variables), infected)
    norm, before = (as_numpy(v)['params'].pop('BatchNorm_0') for v in (purified.variables, infected))
    for name in ('scale', 'bias'):
        assert norm[name][7] == 0 and before[name][7] != 0
        np.testing.assert_array_equal(np.delete(norm[name], 7), np.delete(before[name], 7))
    blind = amplifier._replace(labels=amplifier.labels[::-1])
    again = run_defense('clp', run._replace(must_be_finished=True), blind, config)
    jax.tree.map(np.testing.assert_array_equal, as_numpy(again.variables), as_numpy(purified.variables))
    (record,) = lines(run)
    assert record['stage'] == 'purify/clp/pruned' and record['threshold'] == 3.0
    assert 1 / 96 <= record['pruned_share'] <= 3 / 96 and 'held_out_accuracy' not in record


def test_purify_chooses_among_thresholds_by_accuracy(make_run, config, amplifier):
    """The labels are what the model predicts after pruning at 3, so that further pruning costs accuracy."""
    pruned = as_numpy(run_defense('clp', make_run('one'), amplifier, config).variables)
    logits = np.asarray(amplifier.module.apply(pruned, amplifier.images.astype(np.float32) / 255))
    centred = as_numpy(amplifier.variables)
    for variables in (pruned, centred):
        variables['params']['Dense_1']['bias'] -= logits.mean(axis=0)  # so that no class is predicted everywhere
    labels = (logits - logits.mean(axis=0)).argmax(axis=1)
    assert len(set(labels)) > 1
    data = amplifier._replace(variables=centred, labels=labels.astype(np.int32))
    config.clp.thresholds = (0.0, 3.0, 9.0)
    for budget, threshold in ((0.0, 3.0), (1.0, 0.0)):
        config.tuning.budget = budget
        run = make_run(f'budget{budget}')
        purified = run_defense('clp', run, data, config)
        (record,) = lines(run)
        assert record['threshold'] == threshold
        if threshold == 3.0:
            assert record['held_out_accuracy'] == 1.0
            jax.tree.map(np.testing.assert_array_equal, as_numpy(purified.variables), as_numpy(pruned))


def test_prune_leaves_a_network_without_norms_alone(make_run, config, dataset):
    module = nn.Dense(4)
    images = dataset.train_images[:8]
    data = DefenderData(module, random_variables(module, (8, 8, 1), 3), images, dataset.train_labels[:8])
    purified = run_defense('clp', make_run(), data, config)
    jax.tree.map(np.testing.assert_array_equal, purified.variables, data.variables)


def test_validate_names_a_wrong_threshold(config):
    config.clp.thresholds = (-1.0,)
    with pytest.raises(UserError, match=r'clp.thresholds=\(-1.0,\) must not be negative'):
        validate(config)
