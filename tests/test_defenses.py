"""AFT's step against NumPy on a linear classifier; what purifying does and what it leaves alone."""

import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import scipy.special

from aft_jax.adversarial.perturbations import Perturbation, PerturbationSpec
from aft_jax.adversarial.pgd import PGD
from aft_jax.config import default_config, resolve
from aft_jax.data.augment import cut_mix
from aft_jax.defenses import DEFENSES, DefenderData, aft, aft_step, defender
from aft_jax.errors import UserError
from aft_jax.training import state
from aft_jax.training.optimiser import sgd
from aft_jax.validation import validate

RATE, EPS, TRAVELLED = 0.5, 0.1, 0.06
NOTHING = ml_collections.ConfigDict({'crop': 0, 'flip': False, 'rotation': 0.0})
RECIPE = aft_step.Recipe(PGD(EPS, step_size=0.02, steps=3), adversarial_share=1.0, distillation=0.0, augment=NOTHING)


class Linear(nn.Module):
    """Two classes, no BatchNorm, no dropout: everything about it can be written down."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dense(2)(images.reshape((len(images), -1)))


def variables(seed):
    generator = np.random.default_rng(seed)
    kernel, bias = generator.normal(0, 0.5, (16, 2)), generator.normal(0, 0.5, 2)
    return {'params': {'Dense_0': {'kernel': kernel.astype(np.float32), 'bias': bias.astype(np.float32)}}}


IMAGES = np.random.default_rng(0).uniform(0.2, 0.8, (8, 4, 4, 1)).astype(np.float32)
LABELS = np.array([0, 1, 1, 0, 1, 0, 0, 1], np.int32)
MODEL, SUSPECT = variables(1), variables(2)


def logits(model, images):
    dense = model['params']['Dense_0']
    return images.reshape(len(images), -1).astype(np.float64) @ dense['kernel'] + dense['bias']


def cross_entropy(z, labels):
    return -scipy.special.log_softmax(z, axis=1)[np.arange(len(z)), labels].mean()


def adversarial(model, images, labels):
    """Linf PGD has a closed form on two linear classes: a straight way along the sign of w_other - w_label."""
    kernel = model['params']['Dense_0']['kernel']
    uphill = np.sign(kernel[:, 1 - labels] - kernel[:, labels]).T.reshape(images.shape)
    return images + TRAVELLED * uphill


def step(recipe):
    """One step of AFT on the fixed batch; returns (parameters, metrics) as NumPy."""
    return steps(recipe, [0])[0]


def steps(recipe, seeds):
    """The same step with one key after another, each from the same state."""
    optimiser = sgd(RATE, 'constant', 10, weight_decay=0.0)
    batch = {'images': jnp.asarray(IMAGES), 'labels': jnp.asarray(LABELS), 'constants': SUSPECT | {'batch_stats': {}}}
    before = state.create(jax.tree.map(jnp.asarray, MODEL), optimiser)
    taken = jax.jit(partial(aft_step.aft_step, module=Linear(), optimiser=optimiser, recipe=recipe))
    results = []
    for seed in seeds:
        after, metrics = taken(before, batch, jax.random.key(seed))
        assert int(after.step) == 1
        results.append(jax.tree.map(np.asarray, (after.params['Dense_0'], metrics)))
    return results


def test_share_one_trains_on_adversarial_examples_alone():
    examples = adversarial(MODEL, IMAGES, LABELS)
    z = logits(MODEL, examples)
    params, metrics = step(RECIPE)
    np.testing.assert_allclose(metrics['loss'], cross_entropy(z, LABELS), atol=1e-5)
    assert abs(cross_entropy(z, LABELS) - cross_entropy(logits(MODEL, IMAGES), LABELS)) > 0.01
    fooled = np.mean(z.argmax(axis=1) != LABELS)
    np.testing.assert_allclose(metrics['fooled'], fooled, atol=1e-6)
    np.testing.assert_allclose(metrics['accuracy'], 1 - fooled, atol=1e-6)
    # The gradient of cross-entropy by hand, the examples held fixed.
    error = (scipy.special.softmax(z, axis=1) - np.eye(2)[LABELS]) / 8
    kernel_gradient = examples.reshape(8, 16).T.astype(np.float64) @ error
    before = MODEL['params']['Dense_0']
    np.testing.assert_allclose(params['kernel'], before['kernel'] - RATE * kernel_gradient, atol=1e-5)
    np.testing.assert_allclose(params['bias'], before['bias'] - RATE * error.sum(axis=0), atol=1e-5)
    length = np.sqrt((kernel_gradient**2).sum() + (error.sum(axis=0) ** 2).sum())
    np.testing.assert_allclose(metrics['grad_norm'], length, atol=1e-5)


@pytest.mark.parametrize(('share', 'count'), [(0.5, 4), (0.25, 2), (0.0, 0)])
@pytest.mark.parametrize('distillation', [0.0, 2.0])
def test_mixed_batches_and_distillation_equal_numpy(share, count, distillation):
    """Adversarial first, clean after; the clean ones are held to the suspect's predictions by KL(suspect || model)."""
    batch = np.concatenate([adversarial(MODEL, IMAGES[:count], LABELS[:count]), IMAGES[count:]])
    expected = cross_entropy(logits(MODEL, batch), LABELS)
    p = scipy.special.softmax(logits(SUSPECT, IMAGES[count:]), axis=1)
    q = scipy.special.softmax(logits(MODEL, IMAGES[count:]), axis=1)
    divergence = scipy.special.rel_entr(p, q).sum(axis=1).mean()
    reverse = scipy.special.rel_entr(q, p).sum(axis=1).mean()
    assert divergence > 0.01 and abs(divergence - reverse) > 0.01  # the direction matters
    _, metrics = step(RECIPE._replace(adversarial_share=share, distillation=distillation))
    np.testing.assert_allclose(metrics['loss'], expected + distillation * divergence, atol=1e-5)
    assert ('fooled' in metrics) == (count > 0)


def test_weights_and_rectangles_equal_numpy():
    """Four adversarial images, and clean ones with a part of another, without label."""
    examples = adversarial(MODEL, IMAGES[:4], LABELS[:4])
    key = jax.random.fold_in(jax.random.key(0), 0)
    mixtures = np.asarray(cut_mix(key, IMAGES[4:], 0.8))
    assert not np.array_equal(mixtures, IMAGES[4:])
    of_examples = 1.5 * cross_entropy(logits(MODEL, examples), LABELS[:4]) / 2
    expected = of_examples + 2.0 * divergence(mixtures)
    _, metrics = step(RECIPE._replace(adversarial_share=0.5, distillation=2.0, adversarial_weight=1.5, cutmix=0.8))
    np.testing.assert_allclose(metrics['loss'], expected, atol=1e-5)
    hits = logits(MODEL, examples).argmax(axis=1) == LABELS[:4]
    assert metrics['accuracy'] == hits.mean() == 1 - metrics['fooled']


def divergence(images):
    """The mean of KL(suspect || model)."""
    p, q = (scipy.special.softmax(logits(model, images), axis=1) for model in (SUSPECT, MODEL))
    return scipy.special.rel_entr(p, q).sum(axis=1).mean()


FAMILIES = (PerturbationSpec('linf', 0.1), PerturbationSpec('l2', 0.4))


def shared_state(optimiser, changes):
    return aft_step.SharedState(state.create(jax.tree.map(jnp.asarray, MODEL), optimiser), changes)


def test_universal_examples_go_on_where_the_last_step_left_them_until_they_begin_anew():
    """Images of one class and two classes: the gradient is the same at all of them, but for how long it is."""
    optimiser = sgd(RATE, 'constant', 10, weight_decay=0.0)
    labels = np.zeros(8, np.int32)
    batch = {'images': jnp.asarray(IMAGES), 'labels': jnp.asarray(labels), 'constants': SUSPECT | {'batch_stats': {}}}
    recipe = RECIPE._replace(adversarial_share=0.5, distillation=2.0, specs=FAMILIES, renew_every=3)
    taken = jax.jit(partial(aft_step.families_step, module=Linear(), optimiser=optimiser, recipe=recipe))
    kernel = MODEL['params']['Dense_0']['kernel']
    uphill = (kernel[:, 1] - kernel[:, 0]).reshape(1, 4, 4, 1)
    begin = (0.03 * np.ones((1, 4, 4, 1), np.float32), np.zeros((1, 4, 4, 1), np.float32))
    changes = tuple(Perturbation(jnp.asarray(values), jnp.ones(())) for values in begin)
    before = shared_state(optimiser, changes)
    before = before.replace(classifier=before.classifier.replace(step=jnp.int32(1)))
    after, metrics = taken(before, batch, jax.random.key(0))
    # Three steps of a quarter, each projected.
    linf, l2 = begin
    for _ in range(3):
        linf = np.clip(linf + 0.025 * np.sign(uphill), -0.1, 0.1)
        l2 = l2 + 0.1 * uphill / np.linalg.norm(uphill)
    np.testing.assert_allclose(after.changes[0].values, linf, atol=1e-6)
    np.testing.assert_allclose(after.changes[1].values, l2, atol=1e-6)
    examples = np.clip(np.concatenate([IMAGES[:2] + linf, IMAGES[2:4] + l2]), 0, 1)
    expected = cross_entropy(logits(MODEL, np.concatenate([examples, IMAGES[4:]])), labels)
    np.testing.assert_allclose(metrics['loss'], expected + 2.0 * divergence(IMAGES[4:]), atol=1e-5)
    assert int(after.step) == 2
    # At a multiple of renew_every what was carried is of no consequence, and the key decides.
    renewed = before.replace(classifier=before.classifier.replace(step=jnp.int32(3)))
    others = shared_state(optimiser, jax.tree.map(lambda x: x + 0.01, changes))
    others = others.replace(classifier=others.classifier.replace(step=jnp.int32(3)))
    first, again = (taken(s, batch, jax.random.key(1))[0].changes[1].values for s in (renewed, others))
    other = taken(renewed, batch, jax.random.key(2))[0].changes[1].values
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_changes_of_each_images_own_are_made_and_not_carried():
    """Beside shared ones; the labels that move the shared change here are those of its own images alone."""
    optimiser = sgd(RATE, 'constant', 10, weight_decay=0.0)
    labels = np.zeros(8, np.int32)
    batch = {'images': jnp.asarray(IMAGES), 'labels': jnp.asarray(labels), 'constants': SUSPECT | {'batch_stats': {}}}
    specs = (PerturbationSpec('sparse', 2, shared=False), PerturbationSpec('linf', 0.1))
    recipe = RECIPE._replace(adversarial_share=0.5, specs=specs, renew_every=3)
    change = Perturbation(jnp.zeros((1, 4, 4, 1), jnp.float32), jnp.ones(()))
    before = shared_state(optimiser, (change,))
    before = before.replace(classifier=before.classifier.replace(step=jnp.int32(1)))
    taken = jax.jit(partial(aft_step.families_step, module=Linear(), optimiser=optimiser, recipe=recipe))
    after, metrics = taken(before, batch, jax.random.key(0))
    kernel = MODEL['params']['Dense_0']['kernel']
    uphill = (kernel[:, 1] - kernel[:, 0]).reshape(4, 4, 1)
    assert len(after.changes) == 1
    linf = np.clip(3 * 0.025 * np.sign(uphill), -0.1, 0.1)
    np.testing.assert_allclose(after.changes[0].values[0], linf, atol=1e-6)
    own = IMAGES[:2].copy()
    for image in own:
        gain = (np.abs(uphill) * np.abs((uphill > 0) - image)).ravel()
        longest = np.argsort(-gain)[:6]
        image.reshape(-1)[longest] = (uphill.ravel() > 0)[longest]
    examples = np.concatenate([own, np.clip(IMAGES[2:4] + linf, 0, 1)])
    expected = cross_entropy(logits(MODEL, np.concatenate([examples, IMAGES[4:]])), labels)
    np.testing.assert_allclose(metrics['loss'], expected, atol=1e-5)


def test_the_changes_of_a_config_are_as_large_as_it_says():
    config = resolve(default_config())
    config.aft.update({'eps': 0.1, 'rms_eps': 0.2, 'sparse_share': 0.5, 'warp_share': 0.25, 'pgd_steps': 3})
    assert aft.specs_of(config.aft, (6, 6, 1)) == (
        PerturbationSpec('linf', 0.1),
        PerturbationSpec('l2', pytest.approx(1.2)),
        PerturbationSpec('sparse', 6),  # in each of three steps
        PerturbationSpec('warp', 1.5),
        PerturbationSpec('linf', 0.1, shared=False),
        PerturbationSpec('l2', pytest.approx(1.2), shared=False),
        PerturbationSpec('sparse', 6, shared=False),
    )
    config.aft.update({'universal': 'warp, linf', 'per_image': ''})
    assert [family.kind for family in aft.specs_of(config.aft, (6, 6, 1))] == ['warp', 'linf']
    config.aft.rms_eps = 2.0
    validate(config)  # nobody asks for it
    config.aft.update({'universal': 'l2', 'per_image': 'sparse'})
    assert aft.specs_of(config.aft, (6, 6, 1))[1] == PerturbationSpec('sparse', 6, shared=False)
    with pytest.raises(UserError, match=r'aft.rms_eps=2 is in units of \[0, 1\] pixels'):
        validate(config)
    config.aft.update({'rms_eps': 0.1, 'cutmix': 0.5, 'distillation': 0.0})
    with pytest.raises(UserError, match='aft.cutmix=0.5 leaves clean images without labels'):
        validate(config)


def test_distillation_teaches_the_model_and_not_the_suspect():
    """Its gradient is weight * (softmax(model) - softmax(suspect)), beside that of cross-entropy."""
    z = logits(MODEL, IMAGES)
    model, suspect = scipy.special.softmax(z, axis=1), scipy.special.softmax(logits(SUSPECT, IMAGES), axis=1)
    error = ((model - np.eye(2)[LABELS]) + 3.0 * (model - suspect)) / 8
    params, _ = step(RECIPE._replace(adversarial_share=0.0, distillation=3.0))
    before = MODEL['params']['Dense_0']
    np.testing.assert_allclose(params['bias'], before['bias'] - RATE * error.sum(axis=0), atol=1e-5)
    kernel = before['kernel'] - RATE * IMAGES.reshape(8, 16).T.astype(np.float64) @ error
    np.testing.assert_allclose(params['kernel'], kernel, atol=1e-5)


def test_only_the_adversarial_stretch_calls_pgd(monkeypatch):
    def never(*_, **__):
        raise AssertionError('PGD was called')

    monkeypatch.setattr(aft_step, 'perturb', never)
    step(RECIPE._replace(adversarial_share=0.0))
    with pytest.raises(AssertionError, match='PGD was called'):
        step(RECIPE)


def test_the_key_decides_augmentation_and_start():
    for recipe in (
        RECIPE._replace(adversarial_share=0.0, augment=ml_collections.ConfigDict(dict(NOTHING, crop=1))),
        RECIPE._replace(pgd=RECIPE.pgd._replace(random_start=True)),
        RECIPE._replace(adversarial_share=0.0, distillation=1.0, cutmix=0.5),
    ):
        first, again, other = (metrics['loss'] for _, metrics in steps(recipe, [0, 0, 1]))
        assert first == again != other


@pytest.fixture
def held_data(dataset, tiny_net, tiny_variables):
    """24 clean images and a fresh network as the suspect model."""
    return DefenderData(tiny_net, tiny_variables, dataset.train_images[:24], dataset.train_labels[:24])


@pytest.fixture
def purify(make_run, config, held_data):
    """Returns a function that purifies with the given options of a defense; returns the state and the record."""

    def call(defense, name='run', devices=4, **options):
        config[defense].update(options)
        run = make_run(name, devices=devices)
        fitted = DEFENSES[defense](run, f'purify/{defense}', held_data, resolve(config))
        return fitted.state, [json.loads(line) for line in (run.workdir / 'metrics.jsonl').read_text().splitlines()]

    return call


def assert_left_alone(held_data, before, after):
    """Asserts that the suspect is what it was, and that the purified model is another."""
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, held_data.variables), before)
    assert not np.allclose(after.params['Dense_0']['kernel'], before['params']['Dense_0']['kernel'])
    assert not np.allclose(after.batch_stats['BatchNorm_0']['mean'], before['batch_stats']['BatchNorm_0']['mean'])


def test_aft_switches_phases_at_the_right_step_and_leaves_the_suspect_alone(purify, held_data):
    """24 images in batches of 8 are 3 steps an epoch: 2 adversarial epochs of 3 are 6 steps of 9."""
    before = jax.tree.map(np.array, held_data.variables)
    after, record = purify('aft', epochs=3, adversarial_epochs=2.0, pgd_steps=1)
    assert int(after.step) == 9
    assert {line['stage'] for line in record} == {'purify/aft'}
    assert [line['step'] for line in record] == list(range(1, 10))
    assert ['fooled' in line for line in record] == [True] * 6 + [False] * 3
    assert_left_alone(held_data, before, after)


def test_aft_on_four_devices_equals_one(purify, assert_trees_close):
    """Parameters, statistics and metrics of adversarial and clean steps, with distillation and clipped gradients."""
    options = {'epochs': 2, 'adversarial_epochs': 1.0, 'pgd_steps': 2}
    (one, first), (four, second) = (purify('aft', str(n), devices=n, **options) for n in (1, 4))
    assert_trees_close(four, one, atol=1e-5)
    assert [line['step'] for line in first] == list(range(1, 7)) and 'fooled' in first[0]
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_the_teacher_of_distillation_is_the_suspect_in_every_step(make_run, config, dataset):
    """Two steps of purifying by hand: the teacher agrees with the student in the first and no longer in the second."""
    images, labels, weight = dataset.train_images[:24], dataset.train_labels[:24] % 2, 30.0
    suspect = jax.tree.map(lambda array: np.repeat(array, 4, axis=0) / 2 if array.ndim == 2 else array, SUSPECT)
    config.batch_size = 24  # all images in each step, so that their order is of no consequence
    config.train.weight_decay = 0.0
    nearly_none = {'adversarial_share': 0.01, 'adversarial_epochs': 1.0, 'max_grad_norm': 0.0, 'cutmix': 0.0}
    config.aft.update(
        nearly_none | {'epochs': 2, 'learning_rate': RATE, 'schedule': 'constant', 'distillation': weight}
    )
    run = make_run()
    held = DefenderData(Linear(), suspect | {'batch_stats': {}}, images, labels)
    DEFENSES['aft'](run, 'purify/aft', held, resolve(config))
    first, second = [json.loads(line)['loss'] for line in (run.workdir / 'metrics.jsonl').read_text().splitlines()]

    x = images / 255
    z = logits(suspect, x)
    error = (scipy.special.softmax(z, axis=1) - np.eye(2)[labels]) / 24
    dense = suspect['params']['Dense_0']
    moved = {
        'kernel': dense['kernel'] - RATE * x.reshape(24, 64).T @ error,
        'bias': dense['bias'] - RATE * error.sum(0),
    }
    after = logits({'params': {'Dense_0': moved}}, x)
    p, q = scipy.special.softmax(z, axis=1), scipy.special.softmax(after, axis=1)
    divergence = scipy.special.rel_entr(p, q).sum(axis=1).mean()
    np.testing.assert_allclose(first, cross_entropy(z, labels), rtol=1e-4)
    np.testing.assert_allclose(second, cross_entropy(after, labels) + weight * divergence, rtol=1e-4)
    assert weight * divergence > 0.1


def test_fine_tuning_lowers_the_loss_and_leaves_the_suspect_alone(purify, held_data, tiny_net):
    given = jax.tree.map(np.array, held_data.variables)
    after, record = purify('ft', epochs=10, learning_rates=(0.05,))
    assert int(after.step) == 30 == len(record)
    images = held_data.images.astype(np.float32) / 255
    before, now = (
        cross_entropy(np.asarray(tiny_net.apply(v, images)), held_data.labels)
        for v in (held_data.variables, after.variables)
    )
    assert now < 0.5 * before
    assert np.mean([line['loss'] for line in record[-3:]]) < 0.5 * np.mean([line['loss'] for line in record[:3]])
    assert_left_alone(held_data, given, after)


@pytest.mark.parametrize(
    ('accuracies', 'expected'),
    [([0.9, 0.89, 0.885, 0.7], 2), ([0.9, 0.7, 0.89, 0.6], 2), ([0.5, 0.6, 0.6, 0.4], 2), ([0.88], 0)],
)
def test_the_strongest_candidate_within_the_budget_is_taken(accuracies, expected):
    assert defender.strongest(accuracies, budget=0.02) == expected


def test_held_out_images_are_of_every_class_and_train_nothing():
    labels = np.array([0] * 10 + [1] * 3 + [2] * 2 + [3], np.int32)
    held_data = DefenderData(Linear(), {}, np.arange(16, dtype=np.uint8)[:, None, None, None], labels)
    kept, held = defender.hold_out(held_data, 0.2, seed=0)
    np.testing.assert_array_equal(np.bincount(held.labels, minlength=4), [2, 1, 1, 0])
    np.testing.assert_array_equal(np.bincount(kept.labels, minlength=4), [8, 2, 1, 1])
    np.testing.assert_array_equal(np.sort(np.concatenate([kept.images, held.images]).ravel()), np.arange(16))
    for part in (kept, held):
        np.testing.assert_array_equal(labels[part.images.ravel()], part.labels)
    other = defender.hold_out(held_data, 0.2, seed=1)[1]
    assert not np.array_equal(held.images, other.images)
