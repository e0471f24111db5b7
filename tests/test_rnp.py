"""RNP: its two steps against NumPy, and the channel that a whole run prunes."""

from functools import partial

import jax
import jax.numpy as jnp
import linear_numpy
import numpy as np
import optax
from defense_runs import lines, run_twice
from linear_numpy import IMAGES, flat, softmax
from test_pruning import NormNet, norm_net_loss, random_variables, slope
from toys import Linear

from aft_jax.data.augment import AugmentOptions
from aft_jax.defenses import DefenderData, anp, rnp
from aft_jax.training import state
from aft_jax.training.optimiser import sgd

NO_AUGMENTATION = AugmentOptions(crop=0, flip=False, rotation=0.0)


def test_unlearning_step_climbs_and_ends_after_an_epoch_of_low_accuracy():
    """Epochs of two steps; after the end the weights stay and the step counts on."""
    model, rate = linear_numpy.variables(1), 0.3
    optimiser = optax.sgd(rate)
    step = jax.jit(
        partial(
            rnp.unlearning_step,
            module=Linear(),
            optimiser=optimiser,
            epoch=2,
            stop_accuracy=0.2,
            augmentation=NO_AUGMENTATION,
        )
    )
    kernel, bias = (model['params']['Dense_0'][name].astype(np.float64) for name in ('kernel', 'bias'))
    current = rnp.UnlearnedState(state.create(model, optimiser), jnp.zeros(()), jnp.zeros((), bool))
    labels = (flat(IMAGES) @ kernel + bias).argmax(axis=1).astype(np.int32)  # what the model predicts at first
    batch = {'images': jnp.asarray(IMAGES), 'labels': jnp.asarray(labels)}
    ended, shares, ends = False, [], []
    for count in range(1, 11):
        z = flat(IMAGES) @ kernel + bias
        shares.append(np.mean(z.argmax(axis=1) == labels))
        if not ended:
            error = (softmax(z) - np.eye(2)[labels]) / 8
            kernel, bias = kernel + rate * flat(IMAGES).T @ error, bias + rate * error.sum(axis=0)
        ended = ended or (count % 2 == 0 and np.mean(shares[-2:]) <= 0.2)
        ends.append(ended)
        current, metrics = step(current, batch, jax.random.key(0))
        assert bool(metrics['ended']) == ended and int(current.step) == count
        np.testing.assert_allclose(metrics['accuracy'], shares[-1], atol=1e-6)
        np.testing.assert_allclose(current.classifier.params['Dense_0']['kernel'], kernel, rtol=1e-4, atol=1e-4)
    assert not ends[0] and ends[-3]


def test_recovering_step_equals_numpy_twice():
    variables = random_variables(NormNet(), (2, 2, 1), 3)
    generator = np.random.default_rng(4)
    images = generator.uniform(size=(16, 2, 2, 1)).astype(np.float32)
    labels = generator.integers(0, 3, 16).astype(np.int32)
    optimiser = sgd(2.0, 'constant', 2, momentum=0.9, weight_decay=0.0)
    step = jax.jit(
        partial(rnp.recovering_step, module=NormNet(), optimiser=optimiser, weight=0.2, augmentation=NO_AUGMENTATION)
    )
    batch = {'images': images, 'labels': labels, 'constants': variables}
    current = anp.init_masks(variables, optimiser)
    masks, travelled = np.ones(5), np.zeros(5)
    for _ in range(2):
        loss = lambda m: 0.2 * norm_net_loss(variables, images, labels, m, 1.0)  # noqa: E731
        expected_loss = loss(masks)
        travelled = 0.9 * travelled - 2.0 * slope(loss, masks)
        masks = np.clip(masks + travelled, 0, 1)
        current, metrics = step(current, batch, jax.random.key(0))
        np.testing.assert_allclose(current.masks['BatchNorm_0'], masks, atol=5e-5)
        np.testing.assert_allclose([metrics['loss'], metrics['mask']], [expected_loss, masks.mean()], atol=5e-5)
    assert masks.min() < 0.97


def test_purify_prunes_scales_of_the_infected_model(config, dataset, tiny_net, tiny_variables, make_run, monkeypatch):
    data = DefenderData(tiny_net, tiny_variables, dataset.train_images[:32], dataset.train_labels[:32])
    config.rnp.update({'unlearning_epochs': 2, 'recovering_epochs': 4, 'recovering_rate': 5.0})
    config.tuning.budget = 1.0
    run = make_run()
    purified, trained = run_twice('rnp', run, data, config, monkeypatch)
    assert list(trained) == ['purify/rnp/unlearn', 'purify/rnp/recover']
    unlearned = trained['purify/rnp/unlearn'].fitted.state.classifier.params
    constants = trained['purify/rnp/recover'].stage.constants
    jax.tree.map(np.testing.assert_array_equal, constants['params'], unlearned)
    assert not np.allclose(unlearned['Dense_0']['kernel'], tiny_variables['params']['Dense_0']['kernel'], atol=1e-3)
    masks = np.asarray(trained['purify/rnp/recover'].fitted.state.masks['BatchNorm_0'])
    scale = purified.variables['params']['BatchNorm_0']['scale']
    (record,) = (line for line in lines(run) if line['stage'] == 'purify/rnp/pruned')
    assert record['threshold'] == 0.95 and 0 < record['pruned_share'] < 1
    np.testing.assert_array_equal(scale, np.where(masks < 0.95, 0, tiny_variables['params']['BatchNorm_0']['scale']))
    after, before = ({**v['params'], 'BatchNorm_0': None} for v in (purified.variables, tiny_variables))
    jax.tree.map(np.testing.assert_array_equal, after, before)
