"""AFT: its step and its loss against NumPy on a linear classifier, what its attack raises, and its two stages."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from defense_runs import as_numpy, lines, record_stages, run_defense
from linear_numpy import IMAGES, LABELS, cross_entropies, cross_entropy, divergence, flat, logits, softmax, variables
from toys import Interrupted, Linear

from aft_jax.adversarial.perturbations import init_all
from aft_jax.config import as_options, default_config, resolve
from aft_jax.data.augment import AugmentOptions, augment, cut_mix
from aft_jax.defenses import aft, aft_step
from aft_jax.defenses.aft_options import AftOptions, specs_of
from aft_jax.errors import UserError
from aft_jax.models import logits_function
from aft_jax.training import averaging, state
from aft_jax.training.optimiser import sgd
from aft_jax.validation import validate

RATE, DECAY, TEMPERATURE = 0.5, 0.75, 2.0
FLIP = AugmentOptions(crop=0, flip=True, rotation=0.0)
MODEL, INFECTED, REFERENCE = variables(1), variables(2), variables(3)
OPTIONS = as_options(AftOptions, resolve(default_config()).aft)._replace(
    universal='linf',
    per_image='linf',
    pgd_steps=3,
    adversarial_share=0.5,
    adversarial_weight=1.5,
    cross_entropy=0.4,
    distillation=0.7,
    temperature=TEMPERATURE,
    mixture_weight=1.3,
    averaging=DECAY,
)
# What a run needs little time for, with both stages.
SHORT = {
    'reference_steps': 4,
    'steps': 6,
    'pgd_steps': 1,
    'universal': 'linf,rectangle',
    'per_image': 'linf',
    'averaging': 0.5,
}


def gradient_of_difference(images, labels):
    """Computes the gradient of CE(model) - CE(reference) for each image, [B, H, W, C]."""
    gradients = [
        (softmax(logits(each, images)) - np.eye(2)[labels]) @ each['params']['Dense_0']['kernel'].T
        for each in (MODEL, REFERENCE)
    ]
    return (gradients[0] - gradients[1]).reshape(images.shape)


def attacked(images, labels, key):
    """Takes three steps of a universal linf perturbation of two images, and of one for each of two further images."""
    examples = []
    for start, members in zip(
        init_all(specs_of(OPTIONS, (4, 4, 1)), key, images), (slice(2), slice(2, 4)), strict=True
    ):
        size, change = np.asarray(start.size), np.asarray(start.values)
        for _ in range(3):
            gradient = gradient_of_difference(images[members] + change, labels[members])
            gradient = gradient.sum(axis=0, keepdims=True) if len(change) == 1 else gradient
            change = np.clip(change + size * np.sign(gradient) / 4, -size, size)
        examples.append(images[members] + change)
    examples = np.concatenate(examples)
    assert examples.min() > 0 and examples.max() < 1  # so that nothing is clipped
    return examples


def start(model, optimiser):
    averaged = averaging.init(state.create(jax.tree.map(jnp.asarray, model), optimiser))
    return aft_step.init_state(averaged, OPTIONS, (4, 4, 1))


def test_aft_step_equals_numpy():
    """Loss, gradient, metrics and average of one step, with four adversarial examples of eight images."""
    step = jax.jit(
        partial(
            aft_step.aft_step,
            module=Linear(),
            optimiser=sgd(RATE, 'constant', 10, momentum=0.9, weight_decay=0.0),
            options=OPTIONS,
            augmentation=FLIP,
        )
    )
    constants = {'infected': INFECTED, 'reference': REFERENCE}
    batch = {'images': jnp.asarray(IMAGES), 'labels': jnp.asarray(LABELS), 'constants': constants}
    optimiser = sgd(RATE, 'constant', 10, momentum=0.9, weight_decay=0.0)
    before = start(MODEL, optimiser)
    after, metrics = step(before, batch, jax.random.key(0))
    assert metrics.keys() == {'loss', 'grad_norm', 'fooled', 'accuracy'} and int(after.step) == 1

    augment_key, attack_key, mix_key, _ = jax.random.split(jax.random.key(0), 4)
    images = np.asarray(augment(augment_key, IMAGES, FLIP))
    assert not np.array_equal(images, IMAGES)
    examples, mixtures = attacked(images[:4], LABELS[:4], attack_key), np.asarray(cut_mix(mix_key, images, 1.0))
    clean, adversarial, mixed = (logits(MODEL, x) for x in (images, examples, mixtures))
    soft_clean, soft_infected = (softmax(z / TEMPERATURE) for z in (clean, logits(INFECTED, images)))
    reference = softmax(logits(REFERENCE, examples))
    least = np.minimum(softmax(logits(INFECTED, mixtures)), softmax(logits(REFERENCE, mixtures)))
    agreed = least / least.sum(axis=1, keepdims=True)
    terms = [
        0.4 * cross_entropy(clean, LABELS),
        0.7 * TEMPERATURE**2 * divergence(soft_infected, soft_clean),
        1.5 * divergence(reference, softmax(adversarial)),
        1.3 * divergence(agreed, softmax(mixed)),
    ]
    assert min(terms) > 0.01
    np.testing.assert_allclose(metrics['loss'], sum(terms), atol=1e-5)

    of_clean = 0.4 * (softmax(clean) - np.eye(2)[LABELS]) + 0.7 * TEMPERATURE * (soft_clean - soft_infected)
    error = np.concatenate(
        [of_clean / 8, 1.5 * (softmax(adversarial) - reference) / 4, 1.3 * (softmax(mixed) - agreed) / 8]
    )
    gradient = {'kernel': flat(np.concatenate([images, examples, mixtures])).T @ error, 'bias': error.sum(axis=0)}
    for name, before in MODEL['params']['Dense_0'].items():
        stepped = before - RATE * gradient[name]
        np.testing.assert_allclose(after.classifier.params['Dense_0'][name], stepped, atol=1e-5)
        average = DECAY * before + (1 - DECAY) * stepped
        np.testing.assert_allclose(after.variables['params']['Dense_0'][name], average, atol=1e-5)
    length = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    np.testing.assert_allclose(metrics['grad_norm'], length, atol=1e-5)
    hits = adversarial.argmax(axis=1) == LABELS[:4], reference.argmax(axis=1) == LABELS[:4]
    assert 0 < np.mean(~hits[0] & hits[1]) < np.mean(~hits[0])
    np.testing.assert_allclose(metrics['fooled'], np.mean(~hits[0] & hits[1]))
    np.testing.assert_allclose(metrics['accuracy'], np.mean(clean.argmax(axis=1) == LABELS))


def test_agreement_keeps_the_smaller_probability_of_each_class():
    z = np.random.default_rng(4).normal(0, 2, (2, 5, 3)).astype(np.float32)
    least = np.min([softmax(each) for each in z], axis=0)
    expected = least / least.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(aft_step.agreement(*z), expected, atol=1e-6)
    np.testing.assert_allclose(aft_step.agreement(z[0], z[0]), softmax(z[0]), atol=1e-6)
    # The infected model alone sees the target label 0.
    infected, reference = np.array([[9.0, 2.0, 0.0]], np.float32), np.array([[-9.0, 2.0, 0.0]], np.float32)
    assert softmax(infected)[0, 0] > 0.99 and aft_step.agreement(infected, reference)[0, 0] < 0.02
    # Two models that are certain of different classes.
    certain = np.array([[120.0, 0.0]], np.float32)
    np.testing.assert_allclose(aft_step.agreement(certain, certain[:, ::-1]), [[0.5, 0.5]], atol=1e-6)


@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_divergence_equals_scipy(temperature):
    target, current = (np.random.default_rng(5).normal(0, scale, (6, 4)).astype(np.float32) for scale in (4, 1))
    p, q = softmax(target / temperature), softmax(current / temperature)
    expected = temperature**2 * scipy.stats.entropy(p, q, axis=1).mean()
    assert abs(expected - temperature**2 * scipy.stats.entropy(q, p, axis=1).mean()) > 0.01
    np.testing.assert_allclose(aft_step.divergence(target, current, temperature), expected, rtol=1e-5)


def test_difference_is_that_of_the_cross_entropies_of_each_image():
    current, reference = (logits_function(Linear(), each) for each in (MODEL, REFERENCE))
    expected = cross_entropies(logits(MODEL, IMAGES), LABELS) - cross_entropies(logits(REFERENCE, IMAGES), LABELS)
    np.testing.assert_allclose(aft_step.difference(current, reference, LABELS)(IMAGES), expected, atol=1e-5)


def test_attack_fools_the_model_and_not_the_reference():
    """The left half of an image is a backdoor of the model. To the right half the reference is more sensitive.

    Both push towards class 1. An attack on the model alone would brighten all pixels.
    """
    left = np.repeat(np.arange(4)[None] < 2, 4, axis=0)
    slopes = {'model': np.where(left, 0.5, 0.05), 'reference': np.where(left, 0.0, 0.5)}
    kernels = {name: np.stack([-slope.ravel(), slope.ravel()], axis=1) for name, slope in slopes.items()}
    bias = {name: np.array([k[:, 1].sum(), -k[:, 1].sum()]) / 2 for name, k in kernels.items()}
    current, reference = (
        {'params': {'Dense_0': {'kernel': np.float32(kernels[name]), 'bias': np.float32(bias[name])}}}
        for name in ('model', 'reference')
    )
    labels, options = np.zeros(8, np.int32), OPTIONS._replace(pgd_steps=8)
    optimiser = sgd(RATE, 'constant', 10, momentum=0.9, weight_decay=0.0)
    examples, carried = aft_step.attack(
        start(current | {'batch_stats': {}}, optimiser),
        logits_function(Linear(), reference),
        jnp.asarray(IMAGES),
        jnp.asarray(labels),
        jax.random.key(0),
        Linear(),
        options,
    )
    examples = np.asarray(examples)
    change = examples - IMAGES
    # The universal perturbation is carried to the next step, the others are not.
    assert len(carried) == 1
    np.testing.assert_allclose(carried[0].values, change[:1], atol=1e-6)
    # Eight steps of a quarter of the size cross the whole range.
    size = np.abs(change).max(axis=(1, 2, 3), keepdims=True)
    assert (size >= 0.03).all() and (size <= 0.161).all() and size.std() > 0.01
    np.testing.assert_allclose(change, np.where(left[None, :, :, None], size, -size), atol=1e-6)

    def gain(model):
        return cross_entropies(logits(model, examples), labels) - cross_entropies(logits(model, IMAGES), labels)

    assert (gain(current) > 0.02).all() and (gain(reference) < -0.02).all()


def test_resume_renews_universal_perturbations_in_turn():
    specs = specs_of(OPTIONS._replace(universal='linf,warp', per_image='linf'), (4, 4, 1))
    fresh, carried = (init_all(specs, jax.random.key(seed), jnp.asarray(IMAGES)) for seed in (0, 1))
    renewed = []
    for step in range(8):
        resumed = aft_step.resume(specs, fresh, carried[:2], jnp.int32(step), 4)
        sources = []
        for i, perturbation in enumerate(resumed):
            is_fresh = np.array_equal(perturbation.values, fresh[i].values)
            assert is_fresh or np.array_equal(perturbation.values, carried[i].values)
            sources.append(is_fresh)
        renewed.append(sources)
    assert [row[:2] for row in renewed] == [
        [True, True],
        *([False, False], [False, True], [False, False], [True, False]),
        *([False, False], [False, True], [False, False]),
    ]
    assert all(row[2] for row in renewed)


def test_follow_averages_the_variables_of_every_step():
    generator = np.random.default_rng(6)
    draws = [
        {'params': {'w': generator.normal(size=(2, 3))}, 'batch_stats': {'mean': generator.normal(size=3)}}
        for _ in range(4)
    ]
    models = [jax.tree.map(jnp.float32, draw) for draw in draws]
    optimiser = sgd(0.1, 'constant', 3, momentum=0.9, weight_decay=0.0)
    current = averaging.init(state.create(models[0], optimiser))
    expected = draws[0]
    for step, (draw, model) in enumerate(zip(draws[1:], models[1:], strict=True), start=1):
        classifier = current.classifier.replace(step=jnp.int32(step), **model)
        current = averaging.follow(current, classifier, 0.75)
        expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, expected, draw)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), as_numpy(current.variables), expected)
        jax.tree.map(np.testing.assert_array_equal, current.classifier.variables, model)
        assert int(current.step) == step


def test_specs_of_any_size_for_every_kind():
    options = OPTIONS._replace(universal='rectangle, l2,rectangle', per_image='linf')
    specs = specs_of(options, (6, 6, 1))
    assert [(spec.kind, spec.universal) for spec in specs] == [('rectangle', True), ('l2', True), ('linf', False)]
    assert all(0 < spec.smallest < spec.size for spec in specs)


def test_validate_requires_a_kind_of_perturbation(config):
    config.aft.update({'universal': '', 'per_image': 'linf'})
    validate(config)
    config.aft.per_image = ''
    with pytest.raises(UserError, match=r'^aft.universal and aft.per_image are both empty; name a kind'):
        validate(config)


def test_purify_trains_a_reference_and_then_the_model(config, make_run, held_data, monkeypatch):
    """The stages, what each starts from, the result, and a second start that trains nothing."""
    recorded = record_stages(monkeypatch)
    config.aft.update(SHORT)
    run = make_run(devices=1)
    infected = as_numpy(held_data.variables)
    purified = run_defense('aft', run, held_data, config)
    jax.tree.map(np.testing.assert_array_equal, as_numpy(held_data.variables), infected)
    assert list(recorded) == ['purify/aft/reference', 'purify/aft/adversarial']
    reference, adversarial = recorded.values()
    for stage, _ in (reference, adversarial):
        np.testing.assert_array_equal(stage.arrays['images'], held_data.images)
    jax.tree.map(np.testing.assert_array_equal, as_numpy(adversarial.stage.state.variables), infected)
    # The reference starts from the infected model with a new head.
    before = as_numpy(reference.stage.state.variables)['params']
    np.testing.assert_array_equal(before['Dense_0']['kernel'], infected['params']['Dense_0']['kernel'])
    assert not np.allclose(before['Dense_1']['kernel'], infected['params']['Dense_1']['kernel'], atol=1e-2)
    constants = as_numpy(adversarial.stage.constants)
    averaged = as_numpy(reference.fitted.state.variables)
    jax.tree.map(np.testing.assert_array_equal, constants, {'infected': infected, 'reference': averaged})
    last = as_numpy(reference.fitted.state.classifier.params)
    assert not np.allclose(averaged['params']['Dense_0']['kernel'], last['Dense_0']['kernel'], atol=1e-4)

    record = lines(run)
    assert [(line['stage'], line['step']) for line in record] == [
        *(('purify/aft/reference', step) for step in range(1, 5)),
        *(('purify/aft/adversarial', step) for step in range(1, 7)),
    ]
    shared = {'stage', 'step', 'epoch', 'loss', 'grad_norm', 'accuracy'}
    assert [line.keys() - shared for line in record] == [{'head_cosine'}] * 4 + [{'fooled'}] * 6
    assert all({'loss', 'grad_norm', 'accuracy'} <= line.keys() for line in record)

    # The averaged parameters, with the statistics of the clean images.
    result = as_numpy(purified.variables)
    jax.tree.map(np.testing.assert_array_equal, result['params'], as_numpy(adversarial.fitted.state.average['params']))
    dense, statistics = result['params']['Dense_0'], result['batch_stats']['BatchNorm_0']
    activations = (flat(held_data.images) / 255 - 0.5) @ dense['kernel'] + dense['bias']
    np.testing.assert_allclose(statistics['mean'], activations.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(statistics['var'], activations.var(axis=0), atol=1e-5)
    assert purified.seconds > reference.fitted.seconds + adversarial.fitted.seconds > 0

    again = run_defense('aft', run._replace(must_be_finished=True), held_data, config)
    jax.tree.map(np.testing.assert_array_equal, as_numpy(again.variables), result)


def test_purify_interrupted_after_the_reference_equals_an_uninterrupted_run(config, make_run, held_data, monkeypatch):
    def interrupt(*_):
        raise Interrupted

    config.aft.update(SHORT)
    whole, cut = (make_run(name, devices=1) for name in ('whole', 'cut'))
    expected = run_defense('aft', whole, held_data, config)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(aft, 'fit', interrupt)
        run_defense('aft', cut, held_data, config)
    first = lines(cut)
    assert {line['stage'] for line in first} == {'purify/aft/reference'}
    actual = run_defense('aft', cut, held_data, config)
    jax.tree.map(np.testing.assert_array_equal, as_numpy(actual.variables), as_numpy(expected.variables))
    # No step of the reference was taken again.
    assert lines(cut)[: len(first)] == first and lines(cut) == lines(whole)


def test_purify_on_four_devices_equals_one(purify, assert_trees_close):
    (one, first), (four, second) = (purify('aft', str(n), devices=n, **SHORT) for n in (1, 4))
    assert_trees_close(four, one, atol=1e-5)
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
