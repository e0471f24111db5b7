"""FST: its step and its new head against NumPy, which networks have a head, and what a whole run trains."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from defense_runs import as_numpy, lines, run_twice
from toys import Linear, SmallNetwork

from aft_jax.config import resolve
from aft_jax.data.augment import AugmentOptions
from aft_jax.defenses import DefenderData, fst
from aft_jax.errors import UserError
from aft_jax.models.head import find_head, layer_at
from aft_jax.models.mnist_cnn import MnistCNN
from aft_jax.models.preact_resnet import PreActResNet
from aft_jax.pipeline import stages
from aft_jax.runtime.sharding import make_mesh
from aft_jax.training import state
from aft_jax.training.optimiser import sgd
from aft_jax.validation import validate

NO_AUGMENTATION = AugmentOptions(crop=0, flip=False, rotation=0.0)


class Nested(nn.Module):
    """A network whose head lies in another module."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        logits = Linear(name='classifier')(nn.Dense(3, name='stem')(images))
        return logits * self.param('temperature', nn.initializers.ones, (1, 2))


class Gated(nn.Module):
    """A network without a head: its dense layer weighs channels, and a convolution gives the logits."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        gates = nn.sigmoid(nn.Dense(images.shape[-1])(images.mean(axis=(1, 2))))
        return nn.Conv(4, (1, 1))(images * gates[:, None, None]).mean(axis=(1, 2))


@pytest.mark.parametrize(
    ('module', 'head'),
    [
        (nn.Dense(4), ()),
        (SmallNetwork(4), ('Dense_1',)),
        (MnistCNN(num_classes=4), ('Dense_1',)),
        (PreActResNet(num_classes=4, width=2), ('head',)),
        (Nested(), ('classifier', 'Dense_0')),
        (Gated(), None),
        (nn.Conv(4, (1, 1)), None),
    ],
)
def test_find_head_returns_the_layer_of_the_logits(module, head):
    assert find_head(module, (16, 16, 1)) == head


def make_gated(**_) -> Gated:
    """Makes the network without a head, as `config.model.factory` asks for it."""
    return Gated()


def test_prepare_explains_that_a_network_has_no_head(config, dataset):
    config.defenses = 'ft,fst'
    config.attack.name = 'none'
    config.model.factory = 'test_fst:make_gated'
    with pytest.raises(UserError, match=r"^the defense 'fst' .* that of Gated does not give the logits; end .* out\.$"):
        stages.prepare(resolve(config), dataset, make_mesh(jax.devices()[:1]))
    config.defenses = 'ft'
    stages.prepare(resolve(config), dataset, make_mesh(jax.devices()[:1]))


def test_draw_head_replaces_the_head_alone(tiny_variables):
    infected = as_numpy(tiny_variables['params'])
    drawn, again, other = (as_numpy(fst.draw_head(jax.random.key(seed), infected, ('Dense_1',))) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, drawn, again)
    for name in ('kernel', 'bias'):
        values = drawn['Dense_1'][name]
        assert values.shape == infected['Dense_1'][name].shape
        assert np.all(values != infected['Dense_1'][name]) and np.all(values != other['Dense_1'][name])
    # 16 inputs, 64 values in the kernel.
    assert 0.2 < np.abs(drawn['Dense_1']['kernel']).max() <= 0.25 and drawn['Dense_1']['kernel'].min() < -0.2
    for layer in infected.keys() - {'Dense_1'}:
        jax.tree.map(np.testing.assert_array_equal, drawn[layer], infected[layer])


def test_fst_step_equals_numpy():
    """Two steps with momentum and weight decay: the momentum is that of the kernel before its projection."""
    rate, alpha, decay = 0.5, 0.3, 0.01
    generator = np.random.default_rng(0)
    images = generator.uniform(0, 1, (8, 4, 4, 1)).astype(np.float32)
    labels = np.array([0, 1, 1, 0, 1, 0, 0, 1], np.int32)
    kernel, bias, infected = (generator.normal(0, 0.5, shape).astype(np.float32) for shape in ((16, 2), 2, (16, 2)))
    optimiser = sgd(rate, 'constant', 2, momentum=0.9, weight_decay=decay)
    step = partial(
        fst.fst_step,
        module=Linear(),
        optimiser=optimiser,
        head=('Dense_0',),
        alpha=alpha,
        augmentation=NO_AUGMENTATION,
    )
    step = jax.jit(step)
    batch = {'images': jnp.asarray(images), 'labels': jnp.asarray(labels), 'constants': jnp.asarray(infected)}
    current = state.create({'params': {'Dense_0': {'kernel': kernel, 'bias': bias}}}, optimiser)

    flat, norm = images.reshape(8, 16).astype(np.float64), np.linalg.norm(infected)
    momenta = [np.zeros((16, 2)), np.zeros(2)]
    for count in (1, 2):
        z = flat @ kernel + bias
        error = (scipy.special.softmax(z, axis=1) - np.eye(2)[labels]) / 8
        gradients = [flat.T @ error + alpha * infected, error.sum(axis=0)]
        entropy = -scipy.special.log_softmax(z, axis=1)[np.arange(8), labels].mean()
        penalty = alpha * np.vdot(kernel, infected)
        momenta = [0.9 * m + g + decay * p for m, g, p in zip(momenta, gradients, (kernel, bias), strict=True)]
        kernel, bias = kernel - rate * momenta[0], bias - rate * momenta[1]
        assert abs(np.linalg.norm(kernel) / norm - 1) > 0.03
        kernel = kernel * norm / np.linalg.norm(kernel)

        current, metrics = step(current, batch, jax.random.key(0))
        assert int(current.step) == count and abs(penalty) > 0.01
        np.testing.assert_allclose(current.params['Dense_0']['kernel'], kernel, atol=1e-5)
        np.testing.assert_allclose(current.params['Dense_0']['bias'], bias, atol=1e-5)
        np.testing.assert_allclose(metrics['loss'], entropy + penalty, atol=1e-5)
        np.testing.assert_allclose(metrics['accuracy'], np.mean(z.argmax(axis=1) == labels), atol=1e-6)
        np.testing.assert_allclose(metrics['head_cosine'], np.vdot(kernel, infected) / norm**2, atol=1e-5)
        length = np.sqrt(sum((g**2).sum() for g in gradients))
        np.testing.assert_allclose(metrics['grad_norm'], length, atol=1e-4)


def test_purify_trains_the_same_new_head_with_each_rate(
    config, dataset, tiny_net, tiny_variables, make_run, monkeypatch
):
    """The head leaves the infected one, the network before it is trained too, and the norm stays."""
    data = DefenderData(tiny_net, tiny_variables, dataset.train_images[:32], dataset.train_labels[:32])
    config.fst.update({'epochs': 2, 'learning_rates': (0.05, 0.1), 'alpha': 2.0})
    config.tuning.budget = 1.0
    run = make_run()
    purified, trained = run_twice('fst', run, data, config, monkeypatch)
    assert list(trained) == ['purify/fst/0.05', 'purify/fst/0.1']
    infected, params = as_numpy(tiny_variables['params']), as_numpy(purified.variables['params'])
    weak, strong = trained.values()
    jax.tree.map(np.testing.assert_array_equal, params, as_numpy(strong.fitted.state.params))
    started = [as_numpy(stage.state.params) for stage, _ in (weak, strong)]
    jax.tree.map(np.testing.assert_array_equal, *started)
    assert np.all(started[0]['Dense_1']['kernel'] != infected['Dense_1']['kernel'])
    np.testing.assert_array_equal(started[0]['Dense_0']['kernel'], infected['Dense_0']['kernel'])
    assert not np.allclose(params['Dense_0']['kernel'], infected['Dense_0']['kernel'], atol=1e-3)

    before, after = (layer_at(tree, ('Dense_1',))['kernel'] for tree in (infected, params))
    np.testing.assert_allclose(np.linalg.norm(after), np.linalg.norm(before), rtol=1e-5)
    last = lines(run)[-1]
    assert last['head_cosine'] == pytest.approx(np.vdot(before, after) / np.linalg.norm(before) ** 2, abs=1e-5)
    assert last['head_cosine'] < -0.1


@pytest.mark.parametrize(
    ('field', 'value', 'sentence'),
    [
        ('alpha', -0.1, 'fst.alpha=-0.1 must not be negative'),
        ('epochs', 0, 'fst.epochs=0 must be positive'),
        ('learning_rates', (0.1, 0.01), r'fst.learning_rates=\(0.1, 0.01\) must be positive numbers that rise'),
        ('max_grad_norm', -1.0, 'fst.max_grad_norm=-1.0 must not be negative'),
        ('schedule', 'linear', "fst.schedule='linear' does not exist"),
    ],
)
def test_validate_names_wrong_values(config, field, value, sentence):
    config.fst[field] = value
    with pytest.raises(UserError, match=sentence):
        validate(config)
