"""AFT without a reference model: its step against NumPy on a linear classifier, what it carries, and its phases."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_numpy import IMAGES, LABELS, cross_entropy, divergence, flat, logits, softmax, variables
from toys import Linear

from aft_jax.adversarial.perturbations import Perturbation, PerturbationSpec
from aft_jax.config import as_options, default_config, resolve
from aft_jax.data.augment import AugmentOptions, cut_mix
from aft_jax.defenses.aft_universal_options import UniversalAftOptions, specs_of
from aft_jax.defenses.aft_universal_step import SharedState, aft_step
from aft_jax.errors import UserError
from aft_jax.training import state
from aft_jax.training.optimiser import sgd
from aft_jax.validation import validate

RATE, EPS, TRAVELLED = 0.5, 0.1, 0.06
# Three steps of PGD on all images of a batch.
OPTIONS = as_options(UniversalAftOptions, resolve(default_config()).aft_released)._replace(
    eps=EPS, step_size=0.02, pgd_steps=3, clip=True
)
MODEL, INFECTED = variables(1), variables(2)
OPTIMISER = sgd(RATE, 'constant', 10, momentum=0.9, weight_decay=0.0)


def adversarial(model, images, labels):
    """Linf PGD has a closed form on two linear classes: a straight way along the sign of w_other - w_label."""
    kernel = model['params']['Dense_0']['kernel']
    uphill = np.sign(kernel[:, 1 - labels] - kernel[:, labels]).T.reshape(images.shape)
    return images + TRAVELLED * uphill


def held_to_infected(images):
    return divergence(softmax(logits(INFECTED, images)), softmax(logits(MODEL, images)))


def compiled_step(options):
    """Compiles a step whose arguments are a state, labels and a key."""
    step = partial(
        aft_step,
        module=Linear(),
        optimiser=OPTIMISER,
        options=options,
        augmentation=AugmentOptions(crop=0, flip=False, rotation=0.0),
    )
    batch = {'images': jnp.asarray(IMAGES), 'constants': INFECTED}
    compiled = jax.jit(step)
    return lambda before, labels, key: compiled(before, batch | {'labels': jnp.asarray(labels)}, key)


def classifier_at(step):
    return state.create(jax.tree.map(jnp.asarray, MODEL), OPTIMISER).replace(step=jnp.int32(step))


def step(options):
    """Takes one step of AFT on the fixed batch; returns (parameters, metrics) as NumPy."""
    after, metrics = compiled_step(options)(classifier_at(0), LABELS, jax.random.key(0))
    assert int(after.step) == 1
    return jax.tree.map(np.asarray, (after.params['Dense_0'], metrics))


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
    error = (softmax(z) - np.eye(2)[LABELS]) / 8
    kernel_gradient = flat(examples).T @ error
    before = MODEL['params']['Dense_0']
    np.testing.assert_allclose(params['kernel'], before['kernel'] - RATE * kernel_gradient, atol=1e-5)
    np.testing.assert_allclose(params['bias'], before['bias'] - RATE * error.sum(axis=0), atol=1e-5)
    length = np.sqrt((kernel_gradient**2).sum() + (error.sum(axis=0) ** 2).sum())
    np.testing.assert_allclose(metrics['grad_norm'], length, atol=1e-5)


@pytest.mark.parametrize(('share', 'count'), [(0.5, 4), (0.0, 0)])
def test_aft_step_equals_numpy_on_mixed_batches_with_distillation(share, count):
    """Adversarial images come first. KL(infected || model) holds the clean ones to the infected model."""
    clean = IMAGES[count:]
    batch = np.concatenate([adversarial(MODEL, IMAGES[:count], LABELS[:count]), clean])
    z, distillation = logits(MODEL, batch), 3.0
    model, infected = softmax(z[count:]), softmax(logits(INFECTED, clean))
    assert abs(divergence(infected, model) - divergence(model, infected)) > 0.01  # the direction matters
    params, metrics = step(OPTIONS._replace(adversarial_share=share, distillation=distillation))
    expected = cross_entropy(z, LABELS) + distillation * divergence(infected, model)
    np.testing.assert_allclose(metrics['loss'], expected, atol=1e-5)
    assert ('fooled' in metrics) == (count > 0)
    error = (softmax(z) - np.eye(2)[LABELS]) / 8
    error[count:] += distillation * (model - infected) / len(clean)
    before = MODEL['params']['Dense_0']
    np.testing.assert_allclose(params['bias'], before['bias'] - RATE * error.sum(axis=0), atol=1e-5)
    np.testing.assert_allclose(params['kernel'], before['kernel'] - RATE * flat(batch).T @ error, atol=1e-5)


def test_aft_step_equals_numpy_with_weights_and_cutmix():
    """Four adversarial images, and clean ones with a part of another, without label."""
    examples = adversarial(MODEL, IMAGES[:4], LABELS[:4])
    key = jax.random.fold_in(jax.random.key(0), 0)
    mixtures = np.asarray(cut_mix(key, IMAGES[4:], 0.8))
    assert not np.array_equal(mixtures, IMAGES[4:])
    of_examples = 1.5 * cross_entropy(logits(MODEL, examples), LABELS[:4]) / 2
    expected = of_examples + 2.0 * held_to_infected(mixtures)
    _, metrics = step(OPTIONS._replace(adversarial_share=0.5, distillation=2.0, adversarial_weight=1.5, cutmix=0.8))
    np.testing.assert_allclose(metrics['loss'], expected, atol=1e-5)
    hits = logits(MODEL, examples).argmax(axis=1) == LABELS[:4]
    assert metrics['accuracy'] == hits.mean() == 1 - metrics['fooled']


def change(values, size):
    values = jnp.full((1, 4, 4, 1), values, jnp.float32)
    return Perturbation(values, jnp.ones(()), jnp.full((1, 1, 1, 1), size, jnp.float32))


def test_aft_step_carries_universal_perturbations_until_they_are_renewed():
    """Images of one class and two classes: the gradient is the same at all of them, but for how long it is."""
    labels = np.zeros(8, np.int32)
    # The L2 norm of an l2 perturbation of 4x4 pixels is 4 rms_eps.
    options = OPTIONS._replace(adversarial_share=0.5, distillation=2.0, universal='linf,l2', rms_eps=0.1, renew_every=3)
    compiled = compiled_step(options)
    kernel = MODEL['params']['Dense_0']['kernel']
    uphill = (kernel[:, 1] - kernel[:, 0]).reshape(1, 4, 4, 1)
    changes = change(0.03, 0.1), change(0.0, 0.4)
    after, metrics = compiled(SharedState(classifier_at(1), changes), labels, jax.random.key(0))
    # Three steps of a quarter, each projected.
    linf, l2 = (np.asarray(each.values) for each in changes)
    for _ in range(3):
        linf = np.clip(linf + 0.025 * np.sign(uphill), -0.1, 0.1)
        l2 = l2 + 0.1 * uphill / np.linalg.norm(uphill)
    np.testing.assert_allclose(after.changes[0].values, linf, atol=1e-6)
    np.testing.assert_allclose(after.changes[1].values, l2, atol=1e-6)
    examples = np.clip(np.concatenate([IMAGES[:2] + linf, IMAGES[2:4] + l2]), 0, 1)
    expected = cross_entropy(logits(MODEL, np.concatenate([examples, IMAGES[4:]])), labels)
    np.testing.assert_allclose(metrics['loss'], expected + 2.0 * held_to_infected(IMAGES[4:]), atol=1e-5)
    assert int(after.step) == 2
    # At a multiple of renew_every the carried perturbations have no influence, and the key decides.
    renewed = SharedState(classifier_at(3), changes)
    others = SharedState(classifier_at(3), jax.tree.map(lambda x: x + 0.01, changes))
    first, again = (compiled(s, labels, jax.random.key(1))[0].changes[1].values for s in (renewed, others))
    other = compiled(renewed, labels, jax.random.key(2))[0].changes[1].values
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_aft_step_does_not_carry_per_image_perturbations():
    """Only its own images move the universal perturbation beside them."""
    labels = np.zeros(8, np.int32)
    # Two pixels of 16 in each of three steps.
    options = OPTIONS._replace(
        adversarial_share=0.5, universal='linf', per_image='sparse', sparse_share=0.375, renew_every=3
    )
    before = SharedState(classifier_at(1), (change(0.0, 0.1),))
    after, metrics = compiled_step(options)(before, labels, jax.random.key(0))
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
    options = as_options(UniversalAftOptions, config.aft_universal)._replace(
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
    section = config.aft_universal
    section.update({'universal': 'linf', 'per_image': '', 'rms_eps': 2.0})
    validate(config)  # a size that is not used
    section.update({'universal': 'l2', 'per_image': 'sparse'})
    with pytest.raises(UserError, match=r'aft_universal.rms_eps=2 is in units of \[0, 1\] pixels'):
        validate(config)
    section.update({'rms_eps': 0.1, 'cutmix': 0.5, 'distillation': 0.0})
    with pytest.raises(UserError, match='aft_universal.cutmix=0.5 leaves clean images without labels'):
        validate(config)


def test_purify_switches_phases_at_the_right_step(purify):
    """24 images in batches of 8 are 3 steps an epoch: 2 adversarial epochs of 3 are 6 steps of 9."""
    _, record = purify(
        'aft_universal', devices=1, epochs=3, adversarial_epochs=2.0, pgd_steps=1, universal='linf', per_image=''
    )
    assert {line['stage'] for line in record} == {'purify/aft_universal'}
    assert [line['step'] for line in record] == list(range(1, 10))
    assert ['fooled' in line for line in record] == [True] * 6 + [False] * 3
