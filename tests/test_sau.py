"""SAU: its perturbations and its step against NumPy, and what a whole run trains."""

from functools import partial

import jax
import jax.numpy as jnp
import linear_numpy
import numpy as np
import optax
import pytest
from defense_runs import as_numpy, lines, run_twice
from linear_numpy import IMAGES, LABELS, cross_entropies, logits, softmax, variables
from toys import Linear

from aft_jax.data.augment import AugmentOptions
from aft_jax.defenses import DefenderData, sau
from aft_jax.errors import UserError
from aft_jax.models import logits_function
from aft_jax.training import state
from aft_jax.validation import validate

NO_AUGMENTATION = AugmentOptions(crop=0, flip=False, rotation=0.0)
OPTIONS = sau.SauOptions(
    eps=0.2,
    step_size=0.2,
    steps=5,
    attack_weight=0.4,
    sharing_weight=1.0,
    clean_weight=1.0,
    adversarial_weight=0.5,
    unlearning_weight=2.0,
    epochs=1,
    learning_rates=(0.1,),
)


def is_shared(models, images):
    first, second = (logits(model, images).argmax(axis=1) for model in models)
    return (first == second) & (first != LABELS)


def shared_perturbations(models):
    """The perturbations of two linear models in float64, with written-out gradients; and how many are shared."""
    perturbation = np.full(IMAGES.shape, 0.2)
    counts = [is_shared(models, IMAGES + perturbation).sum()]
    for _ in range(5):
        z = [logits(model, IMAGES + perturbation) for model in models]
        p = [softmax(x) for x in z]
        shared = is_shared(models, IMAGES + perturbation)
        middle = np.mean(p, axis=0)
        gradient = np.zeros((8, 16))
        for model, x, probabilities in zip(models, z, p, strict=True):
            robust = x.argmax(axis=1) == LABELS
            slope = -0.4 / 2 * (probabilities - np.eye(2)[LABELS]) * (robust / max(1, robust.sum()))[:, None]
            ratio = np.log(probabilities / middle) / 2
            sharing = probabilities * (ratio - (probabilities * ratio).sum(axis=1, keepdims=True))
            slope += sharing * (~shared / max(1, (~shared).sum()))[:, None]
            gradient += slope @ model['params']['Dense_0']['kernel'].T
        perturbation = np.clip(perturbation - 0.2 * np.sign(gradient).reshape(IMAGES.shape), -0.2, 0.2)
        counts.append(is_shared(models, IMAGES + perturbation).sum())
    return perturbation, counts


MODELS = variables(1), variables(10)


def test_shared_perturbations_equal_numpy():
    expected, counts = shared_perturbations(MODELS)
    functions = [logits_function(Linear(), model) for model in MODELS]
    actual = jax.jit(lambda x: sau.shared_perturbations(*functions, x, jnp.asarray(LABELS), OPTIONS))(IMAGES)
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert counts[0] < counts[-1] < 8  # the search finds shared examples, and not of every image
    assert set(np.unique(np.abs(expected)).round(6)) <= {0.0, 0.2}


def test_sau_step_equals_numpy():
    current, infected = MODELS
    perturbed = IMAGES + shared_perturbations(MODELS)[0]
    before, after = (logits(infected, x).argmax(axis=1) for x in (IMAGES, perturbed))
    unlearned = (after != LABELS) & (after != before)
    assert 0 < unlearned.sum() < 8

    def loss(kernel):
        model = {'params': {'Dense_0': current['params']['Dense_0'] | {'kernel': kernel}}}
        z = logits(model, perturbed)
        p = softmax(z)[np.arange(8), after]
        clean = linear_numpy.cross_entropy(logits(model, IMAGES), LABELS)
        return clean + 0.5 * cross_entropies(z, LABELS).mean() - 2 * np.log(1 - p[unlearned]).sum() / 8

    kernel = current['params']['Dense_0']['kernel'].astype(np.float64)
    gradient = np.zeros_like(kernel)
    for place in np.ndindex(*kernel.shape):
        move = np.zeros_like(kernel)
        move[place] = 1e-6
        gradient[place] = (loss(kernel + move) - loss(kernel - move)) / 2e-6

    optimiser = optax.sgd(0.5)
    step = partial(sau.sau_step, module=Linear(), optimiser=optimiser, options=OPTIONS, augmentation=NO_AUGMENTATION)
    batch = {'images': jnp.asarray(IMAGES), 'labels': jnp.asarray(LABELS), 'constants': infected}
    stepped, metrics = jax.jit(step)(state.create(current, optimiser), batch, jax.random.key(0))
    np.testing.assert_allclose(stepped.params['Dense_0']['kernel'], kernel - 0.5 * gradient, atol=1e-5)
    np.testing.assert_allclose(metrics['loss'], loss(kernel), atol=1e-5)
    np.testing.assert_allclose(metrics['shared'], is_shared(MODELS, perturbed).mean(), atol=1e-6)
    np.testing.assert_allclose(metrics['unlearned'], unlearned.mean(), atol=1e-6)


def test_avoidance_loss_is_finite_where_a_class_is_certain():
    z = jnp.array([[0.0, 1.0, 3.0], [200.0, 0.0, 1.0]])
    values, slopes = jax.value_and_grad(lambda z: sau.avoidance_loss(z, jnp.array([2, 0])).sum())(z)
    p = softmax(np.asarray(z[:1], np.float64))[0]
    np.testing.assert_allclose(values, -np.log(1 - p[2]) + 200 - np.log(1 + np.e), rtol=1e-5)
    np.testing.assert_allclose(slopes[1], [1, -1 / (1 + np.e), -np.e / (1 + np.e)], rtol=1e-4)


def test_purify_trains_with_frozen_statistics(config, dataset, tiny_net, tiny_variables, make_run, monkeypatch):
    data = DefenderData(tiny_net, tiny_variables, dataset.train_images[:32], dataset.train_labels[:32])
    config.sau.update({'epochs': 3, 'steps': 2, 'learning_rates': (0.003, 0.01)})
    config.tuning.budget = 1.0
    run = make_run()
    purified, trained = run_twice('sau', run, data, config, monkeypatch)
    assert list(trained) == ['purify/sau/0.003', 'purify/sau/0.01']
    jax.tree.map(np.testing.assert_array_equal, purified.variables['batch_stats'], tiny_variables['batch_stats'])
    strong = [line for line in lines(run) if line['stage'] == 'purify/sau/0.01']
    assert strong[-1]['loss'] < strong[0]['loss']
    infected, params = as_numpy(tiny_variables['params']), as_numpy(purified.variables['params'])
    assert not np.allclose(params['Dense_0']['kernel'], infected['Dense_0']['kernel'], atol=1e-3)


@pytest.mark.parametrize(
    ('field', 'value', 'sentence'),
    [
        ('eps', 8.0, r'sau.eps=8 is in units of \[0, 1\] pixels'),
        ('steps', 0, 'sau.steps=0 must be positive'),
        ('unlearning_weight', -1.0, 'sau.unlearning_weight=-1.0 must not be negative'),
    ],
)
def test_validate_names_wrong_values(config, field, value, sentence):
    config.sau[field] = value
    with pytest.raises(UserError, match=sentence):
        validate(config)
