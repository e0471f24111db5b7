"""AFT's step against NumPy on a linear classifier; what purifying does and what it leaves alone."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from defense_runs import as_numpy, lines, run_defense

from aft_jax.adversarial.perturbations import Perturbation, PerturbationSpec
from aft_jax.config import as_options, default_config, resolve
from aft_jax.data.augment import AugmentOptions, cut_mix
from aft_jax.defenses import DEFENSES, DefenderData, aft, aft_step, defender
from aft_jax.defenses.aft_options import specs_of
from aft_jax.errors import UserError
from aft_jax.pipeline.stages import defense_settings
from aft_jax.training import state
from aft_jax.training.optimiser import sgd
from aft_jax.validation import validate

RATE, EPS, TRAVELLED = 0.5, 0.1, 0.06
NO_AUGMENTATION = AugmentOptions(crop=0, flip=False, rotation=0.0)
# Three steps of PGD on all images of a batch.
OPTIONS = as_options(aft.AftOptions, resolve(default_config()).aft_released)._replace(
    eps=EPS, step_size=0.02, pgd_steps=3, clip=True
)


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
MODEL, INFECTED = variables(1), variables(2)


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


def step(options):
    """Takes one step of AFT on the fixed batch; returns (parameters, metrics) as NumPy."""
    return steps(options, [0])[0]


def compiled_step(optimiser, options, augmentation=NO_AUGMENTATION):
    return jax.jit(
        partial(aft_step.aft_step, module=Linear(), optimiser=optimiser, options=options, augmentation=augmentation)
    )


def steps(options, seeds, augmentation=NO_AUGMENTATION):
    """Takes the same step with one key after another, each from the same state."""
    optimiser = sgd(RATE, 'constant', 10, momentum=0.9, weight_decay=0.0)
    batch = {'images': jnp.asarray(IMAGES), 'labels': jnp.asarray(LABELS), 'constants': INFECTED | {'batch_stats': {}}}
    before = state.create(jax.tree.map(jnp.asarray, MODEL), optimiser)
    compiled = compiled_step(optimiser, options, augmentation)
    results = []
    for seed in seeds:
        after, metrics = compiled(before, batch, jax.random.key(seed))
        assert int(after.step) == 1
        results.append(jax.tree.map(np.asarray, (after.params['Dense_0'], metrics)))
    return results


def test_aft_step_of_share_one_trains_on_adversarial_examples_alone():
    examples = adversarial(MODEL, IMAGES, LABELS)
    z = logits(MODEL, examples)
    params, metrics = step(OPTIONS)
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
def test_aft_step_equals_numpy_on_mixed_batches_with_distillation(share, count, distillation):
    """Adversarial images first, then clean ones, which KL(infected || model) keeps close to the infected model."""
    batch = np.concatenate([adversarial(MODEL, IMAGES[:count], LABELS[:count]), IMAGES[count:]])
    expected = cross_entropy(logits(MODEL, batch), LABELS)
    p = scipy.special.softmax(logits(INFECTED, IMAGES[count:]), axis=1)
    q = scipy.special.softmax(logits(MODEL, IMAGES[count:]), axis=1)
    divergence = scipy.special.rel_entr(p, q).sum(axis=1).mean()
    reverse = scipy.special.rel_entr(q, p).sum(axis=1).mean()
    assert divergence > 0.01 and abs(divergence - reverse) > 0.01  # the direction matters
    _, metrics = step(OPTIONS._replace(adversarial_share=share, distillation=distillation))
    np.testing.assert_allclose(metrics['loss'], expected + distillation * divergence, atol=1e-5)
    assert ('fooled' in metrics) == (count > 0)


def test_aft_step_equals_numpy_with_weights_and_cutmix():
    """Four adversarial images, and clean ones with a part of another, without label."""
    examples = adversarial(MODEL, IMAGES[:4], LABELS[:4])
    key = jax.random.fold_in(jax.random.key(0), 0)
    mixtures = np.asarray(cut_mix(key, IMAGES[4:], 0.8))
    assert not np.array_equal(mixtures, IMAGES[4:])
    of_examples = 1.5 * cross_entropy(logits(MODEL, examples), LABELS[:4]) / 2
    expected = of_examples + 2.0 * divergence(mixtures)
    _, metrics = step(OPTIONS._replace(adversarial_share=0.5, distillation=2.0, adversarial_weight=1.5, cutmix=0.8))
    np.testing.assert_allclose(metrics['loss'], expected, atol=1e-5)
    hits = logits(MODEL, examples).argmax(axis=1) == LABELS[:4]
    assert metrics['accuracy'] == hits.mean() == 1 - metrics['fooled']


def divergence(images):
    """The mean of KL(infected || model)."""
    p, q = (scipy.special.softmax(logits(model, images), axis=1) for model in (INFECTED, MODEL))
    return scipy.special.rel_entr(p, q).sum(axis=1).mean()


def shared_state(optimiser, changes):
    return aft_step.SharedState(state.create(jax.tree.map(jnp.asarray, MODEL), optimiser), changes)


def test_aft_step_carries_universal_perturbations_until_they_are_renewed():
    """Images of one class and two classes: the gradient is the same at all of them, but for how long it is."""
    optimiser = sgd(RATE, 'constant', 10, momentum=0.9, weight_decay=0.0)
    labels = np.zeros(8, np.int32)
    batch = {'images': jnp.asarray(IMAGES), 'labels': jnp.asarray(labels), 'constants': INFECTED | {'batch_stats': {}}}
    # The L2 norm of an l2 perturbation of 4x4 pixels is 4 rms_eps.
    options = OPTIONS._replace(adversarial_share=0.5, distillation=2.0, universal='linf,l2', rms_eps=0.1, renew_every=3)
    compiled = compiled_step(optimiser, options)
    kernel = MODEL['params']['Dense_0']['kernel']
    uphill = (kernel[:, 1] - kernel[:, 0]).reshape(1, 4, 4, 1)
    begin = (0.03 * np.ones((1, 4, 4, 1), np.float32), np.zeros((1, 4, 4, 1), np.float32))
    changes = tuple(Perturbation(jnp.asarray(values), jnp.ones(())) for values in begin)
    before = shared_state(optimiser, changes)
    before = before.replace(classifier=before.classifier.replace(step=jnp.int32(1)))
    after, metrics = compiled(before, batch, jax.random.key(0))
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
    # At a multiple of renew_every the carried perturbations have no influence, and the key decides.
    renewed = before.replace(classifier=before.classifier.replace(step=jnp.int32(3)))
    others = shared_state(optimiser, jax.tree.map(lambda x: x + 0.01, changes))
    others = others.replace(classifier=others.classifier.replace(step=jnp.int32(3)))
    first, again = (compiled(s, batch, jax.random.key(1))[0].changes[1].values for s in (renewed, others))
    other = compiled(renewed, batch, jax.random.key(2))[0].changes[1].values
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_aft_step_does_not_carry_per_image_perturbations():
    """Only its own images move the universal perturbation beside them."""
    optimiser = sgd(RATE, 'constant', 10, momentum=0.9, weight_decay=0.0)
    labels = np.zeros(8, np.int32)
    batch = {'images': jnp.asarray(IMAGES), 'labels': jnp.asarray(labels), 'constants': INFECTED | {'batch_stats': {}}}
    # Two pixels of 16 in each of three steps.
    options = OPTIONS._replace(
        adversarial_share=0.5, universal='linf', per_image='sparse', sparse_share=0.375, renew_every=3
    )
    change = Perturbation(jnp.zeros((1, 4, 4, 1), jnp.float32), jnp.ones(()))
    before = shared_state(optimiser, (change,))
    before = before.replace(classifier=before.classifier.replace(step=jnp.int32(1)))
    compiled = compiled_step(optimiser, options)
    after, metrics = compiled(before, batch, jax.random.key(0))
    kernel = MODEL['params']['Dense_0']['kernel']
    uphill = (kernel[:, 1] - kernel[:, 0]).reshape(4, 4, 1)
    assert len(after.changes) == 1
    linf = np.clip(3 * 0.025 * np.sign(uphill), -0.1, 0.1)
    np.testing.assert_allclose(after.changes[0].values[0], linf, atol=1e-6)
    own = IMAGES[2:4].copy()
    for image in own:
        gain = (np.abs(uphill) * np.abs((uphill > 0) - image)).ravel()
        longest = np.argsort(-gain)[:6]
        image.reshape(-1)[longest] = (uphill.ravel() > 0)[longest]
    examples = np.concatenate([np.clip(IMAGES[:2] + linf, 0, 1), own])
    expected = cross_entropy(logits(MODEL, np.concatenate([examples, IMAGES[4:]])), labels)
    np.testing.assert_allclose(metrics['loss'], expected, atol=1e-5)


def test_specs_of_have_the_sizes_of_the_config():
    config = resolve(default_config())
    options = as_options(aft.AftOptions, config.aft)._replace(
        eps=0.1, rms_eps=0.2, sparse_share=0.5, warp_share=0.25, pgd_steps=3
    )
    assert specs_of(options, (6, 6, 1)) == (
        PerturbationSpec('linf', 0.1),
        PerturbationSpec('l2', pytest.approx(1.2)),
        PerturbationSpec('sparse', 6),  # in each of three steps
        PerturbationSpec('warp', 1.5),
        PerturbationSpec('linf', 0.1, universal=False),
        PerturbationSpec('l2', pytest.approx(1.2), universal=False),
        PerturbationSpec('sparse', 6, universal=False),
    )
    few = options._replace(universal='warp, linf,warp', per_image='')
    assert [spec.kind for spec in specs_of(few, (6, 6, 1))] == ['warp', 'linf']
    config.aft.universal = 'linf'
    config.aft.per_image = ''
    config.aft.rms_eps = 2.0
    validate(config)  # a size that is not used
    config.aft.update({'universal': 'l2', 'per_image': 'sparse'})
    with pytest.raises(UserError, match=r'aft.rms_eps=2 is in units of \[0, 1\] pixels'):
        validate(config)
    config.aft.update({'rms_eps': 0.1, 'cutmix': 0.5, 'distillation': 0.0})
    with pytest.raises(UserError, match='aft.cutmix=0.5 leaves clean images without labels'):
        validate(config)


def test_aft_step_distillation_has_the_gradient_of_numpy():
    """Its gradient is weight * (softmax(model) - softmax(infected)), beside that of cross-entropy."""
    z = logits(MODEL, IMAGES)
    model, infected = scipy.special.softmax(z, axis=1), scipy.special.softmax(logits(INFECTED, IMAGES), axis=1)
    error = ((model - np.eye(2)[LABELS]) + 3.0 * (model - infected)) / 8
    params, _ = step(OPTIONS._replace(adversarial_share=0.0, distillation=3.0))
    before = MODEL['params']['Dense_0']
    np.testing.assert_allclose(params['bias'], before['bias'] - RATE * error.sum(axis=0), atol=1e-5)
    kernel = before['kernel'] - RATE * IMAGES.reshape(8, 16).T.astype(np.float64) @ error
    np.testing.assert_allclose(params['kernel'], kernel, atol=1e-5)


def test_aft_step_attacks_in_the_adversarial_phase_only(monkeypatch):
    def never(*_, **__):
        raise AssertionError('PGD was called')

    monkeypatch.setattr(aft_step, 'perturb', never)
    step(OPTIONS._replace(adversarial_share=0.0))
    with pytest.raises(AssertionError, match='PGD was called'):
        step(OPTIONS)


def test_aft_step_depends_on_the_key():
    for options, augmentation in (
        (OPTIONS._replace(adversarial_share=0.0), NO_AUGMENTATION._replace(crop=1)),
        (OPTIONS._replace(random_start=True), NO_AUGMENTATION),
        (OPTIONS._replace(adversarial_share=0.0, distillation=1.0, cutmix=0.5), NO_AUGMENTATION),
    ):
        first, again, other = (metrics['loss'] for _, metrics in steps(options, [0, 0, 1], augmentation))
        assert first == again != other


@pytest.fixture
def held_data(dataset, tiny_net, tiny_variables):
    """24 clean images and a fresh network as the infected model."""
    return DefenderData(tiny_net, tiny_variables, dataset.train_images[:24], dataset.train_labels[:24])


@pytest.fixture
def purify(make_run, config, held_data):
    """Returns a function that purifies with the given options of a defense; returns variables and record."""

    def call(defense, name='run', devices=4, **options):
        config[defense].update(options)
        run = make_run(name, devices=devices)
        return run_defense(defense, run, held_data, config).variables, lines(run)

    return call


def assert_left_alone(held_data, before, after):
    """Asserts that the infected model is unchanged, and that the purified model differs."""
    jax.tree.map(np.testing.assert_array_equal, as_numpy(held_data.variables), before)
    for kind, layer, name in (('params', 'Dense_0', 'kernel'), ('batch_stats', 'BatchNorm_0', 'mean')):
        assert not np.allclose(after[kind][layer][name], before[kind][layer][name])


def test_aft_switches_phases_at_the_right_step_and_leaves_the_infected_model_alone(purify, held_data):
    """24 images in batches of 8 are 3 steps an epoch: 2 adversarial epochs of 3 are 6 steps of 9."""
    before = as_numpy(held_data.variables)
    after, record = purify('aft', epochs=3, adversarial_epochs=2.0, pgd_steps=1, universal='linf', per_image='')
    assert {line['stage'] for line in record} == {'purify/aft'}
    assert [line['step'] for line in record] == list(range(1, 10))
    assert ['fooled' in line for line in record] == [True] * 6 + [False] * 3
    assert_left_alone(held_data, before, after)


def test_aft_on_four_devices_equals_one(purify, assert_trees_close):
    """Parameters, statistics and metrics of adversarial and clean steps, with distillation and clipped gradients."""
    options = {'epochs': 2, 'adversarial_epochs': 1.0, 'pgd_steps': 2, 'universal': 'linf,l2', 'per_image': 'l2'}
    (one, first), (four, second) = (purify('aft', str(n), devices=n, **options) for n in (1, 4))
    assert_trees_close(four, one, atol=1e-5)
    assert [line['step'] for line in first] == list(range(1, 7)) and 'fooled' in first[0]
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_aft_distils_from_the_infected_model_in_every_step(make_run, config, dataset):
    """Two steps by hand: teacher and student agree in the first step and differ in the second."""
    images, labels, weight = dataset.train_images[:24], dataset.train_labels[:24] % 2, 30.0
    infected = jax.tree.map(lambda array: np.repeat(array, 4, axis=0) / 2 if array.ndim == 2 else array, INFECTED)
    config.batch_size = 24  # all images in each step, so that their order does not matter
    config.train.weight_decay = 0.0
    nearly_none = {'adversarial_share': 0.01, 'adversarial_epochs': 1.0, 'max_grad_norm': 0.0, 'cutmix': 0.0}
    config.aft.update(
        nearly_none | {'epochs': 2, 'learning_rate': RATE, 'schedule': 'constant', 'distillation': weight}
    )
    run = make_run()
    held = DefenderData(Linear(), infected | {'batch_stats': {}}, images, labels)
    run_defense('aft', run, held, config)
    first, second = (line['loss'] for line in lines(run))

    x = images / 255
    z = logits(infected, x)
    error = (scipy.special.softmax(z, axis=1) - np.eye(2)[labels]) / 24
    dense = infected['params']['Dense_0']
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


def test_ft_lowers_the_loss_and_leaves_the_infected_model_alone(purify, held_data, tiny_net):
    infected = as_numpy(held_data.variables)
    after, record = purify('ft', epochs=10, learning_rates=(0.05,))
    assert len(record) == 30
    images = held_data.images.astype(np.float32) / 255
    before, now = (
        cross_entropy(np.asarray(tiny_net.apply(v, images)), held_data.labels) for v in (held_data.variables, after)
    )
    assert now < 0.5 * before
    assert np.mean([line['loss'] for line in record[-3:]]) < 0.5 * np.mean([line['loss'] for line in record[:3]])
    assert_left_alone(held_data, infected, after)


@pytest.mark.parametrize(
    ('accuracies', 'expected'),
    [([0.9, 0.89, 0.885, 0.7], 2), ([0.9, 0.7, 0.89, 0.6], 2), ([0.5, 0.6, 0.6, 0.4], 2), ([0.88], 0)],
)
def test_strongest_takes_the_last_within_the_budget(accuracies, expected):
    assert defender.strongest(accuracies, budget=0.02) == expected


def test_hold_out_splits_every_class():
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


@pytest.mark.parametrize('name', DEFENSES)
def test_defense_settings_have_every_field_of_the_section(config, name):
    config = resolve(config)
    options = defense_settings(name, config).options
    values = options._asdict()
    values |= values.pop('aft')._asdict() if name == 'pbe' else {}
    section = config[name].to_dict()
    section.pop('preset', None)
    assert values == {field: tuple(v) if isinstance(v, list) else v for field, v in section.items()}
    hash(options)  # jitted steps are cached by it


def test_choose_measures_candidates_on_the_held_out_images(make_run, held_data):
    """Biases that make each candidate predict one class alone."""
    held = held_data._replace(labels=np.array([0] * 10 + [1] * 12 + [2] * 2, np.int32))

    def constant(label):
        zeros = jax.tree.map(np.zeros_like, held.variables)
        zeros['params']['Dense_1']['bias'] = np.eye(4, dtype=np.float32)[label]
        return zeros

    choice = defender.choose(make_run(), held, map(constant, (1, 0, 2)), defender.TuningOptions(0.2, budget=0.1))
    assert choice.chosen == 1 and choice.accuracy == pytest.approx(10 / 24)
