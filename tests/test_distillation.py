"""NAD: its distance and its step against NumPy, and what a whole run trains on, chooses and leaves alone."""

import time
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import scipy.special

from aft_jax.defenses import DEFENSES, DefenderData, defender, nad
from aft_jax.errors import UserError
from aft_jax.training import state
from aft_jax.training.optimiser import sgd
from aft_jax.validation import validate

BETAS = (500.0, 1000.0, 1000.0)
NOTHING = ml_collections.ConfigDict({'crop': 0, 'flip': False, 'rotation': 0.0})


class Looking(nn.Module):
    """A map of each pixel's own, the same after BatchNorm and ReLU, and the mean over places: two stages."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, features: bool = False):
        first = nn.Dense(3)(images)
        second = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(first))
        logits = nn.Dense(4)(second.mean(axis=(1, 2)))
        return (logits, (first, second)) if features else logits


def maps(seed, *shapes):
    generator = np.random.default_rng(seed)
    return [generator.normal(0, 2, shape).astype(np.float32) for shape in shapes]


def as_numpy(tree):
    return jax.tree.map(np.array, tree)


def attention(features):
    """The paper's: where the energy of an image lies."""
    energy = (features.astype(np.float64) ** 2).sum(axis=3)
    return energy / np.sqrt((energy**2).sum(axis=(1, 2)))[:, None, None]


def distances(ours, theirs):
    return [((attention(a) - attention(b)) ** 2).mean() for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize(('stages', 'betas'), [(3, BETAS), (4, (1.0, 20.0, 300.0)), (2, (1.0, 20.0, 300.0))])
def test_the_distance_equals_numpy(stages, betas):
    """The last stages, or as many as there are; the last beta belongs to the last stage."""
    shapes = [(2, 8, 8, 3), (2, 4, 4, 5), (2, 4, 2, 6), (2, 2, 2, 7)][:stages]
    ours, theirs = maps(1, *shapes), maps(2, *shapes)
    count = min(3, stages)
    expected = np.dot(betas[-count:], distances(ours, theirs)[-count:])
    np.testing.assert_allclose(nad.attention_distance(ours, theirs, betas), expected, rtol=1e-5)


def test_the_distance_has_no_slope_at_the_teacher_and_none_in_the_dark():
    (ours, theirs) = maps(3, (2, 4, 4, 3), (2, 4, 4, 3))
    slope = jax.grad(lambda one, other: nad.attention_distance([one], [other], [1e6]))
    assert not np.any(slope(ours, ours))
    assert np.abs(slope(ours, theirs)).max() > 1
    assert not np.any(slope(np.zeros_like(ours), theirs))


def test_a_step_equals_numpy():
    """The student's maps are those of batch statistics, the teacher's those of its running ones."""
    images = np.random.default_rng(0).uniform(0, 1, (6, 4, 4, 1)).astype(np.float32)
    labels = np.array([0, 1, 2, 3, 0, 1], np.int32)
    student, teacher = (Looking().init(jax.random.key(seed), images) for seed in (1, 2))
    running = {'mean': np.array([0.1, -0.2, 0.3], np.float32), 'var': np.array([0.5, 2.0, 1.0], np.float32)}
    teacher = teacher | {'batch_stats': {'BatchNorm_0': running}}

    def stages(variables, statistics):
        dense = as_numpy(variables['params']['Dense_0'])
        first = images.astype(np.float64) @ dense['kernel'] + dense['bias']
        mean, var = statistics or (first.mean(axis=(0, 1, 2)), first.var(axis=(0, 1, 2)))
        norm = as_numpy(variables['params']['BatchNorm_0'])
        return first, np.maximum((first - mean) / np.sqrt(var + 1e-5) * norm['scale'] + norm['bias'], 0)

    def parts(variables):
        maps = stages(variables, None)
        dense = as_numpy(variables['params']['Dense_1'])
        z = maps[1].mean(axis=(1, 2)) @ dense['kernel'] + dense['bias']
        entropy = -scipy.special.log_softmax(z, axis=1)[np.arange(6), labels].mean()
        return entropy, np.dot((3.0, 50.0), distances(maps, stages(teacher, running.values()))), z

    entropy, distance, z = parts(student)
    assert distance > 0.1

    rate = 1e-5
    optimiser = sgd(rate, 'constant', 1, weight_decay=0.0)
    step = partial(nad.nad_step, module=Looking(), optimiser=optimiser, betas=(3.0, 50.0), augmentation=NOTHING)
    batch = {'images': jnp.asarray(images), 'labels': jnp.asarray(labels), 'constants': teacher}
    after, metrics = jax.jit(step)(state.create(student, optimiser), batch, jax.random.key(0))
    assert int(after.step) == 1
    np.testing.assert_allclose(metrics['distance'], distance, rtol=1e-4)
    np.testing.assert_allclose(metrics['loss'], entropy + distance, rtol=1e-4)
    np.testing.assert_allclose(metrics['accuracy'], np.mean(z.argmax(axis=1) == labels), atol=1e-6)
    # Downhill: the step is short, and so the loss falls by as much as the slope says.
    lower = sum(parts(after.variables)[:2])
    np.testing.assert_allclose(entropy + distance - lower, rate * float(metrics['grad_norm']) ** 2, rtol=0.05)


@pytest.fixture
def held_data(dataset):
    """32 clean images and a fresh network as the suspect model."""
    variables = Looking().init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    return DefenderData(Looking(), variables, dataset.train_images[:32], dataset.train_labels[:32])


@pytest.fixture
def purify(make_run, config, monkeypatch):
    """Returns a function that runs NAD; returns what it returns, and what each stage left."""
    config.nad.update({'teacher_epochs': 1, 'epochs': 2, 'learning_rates': (0.05, 0.1), 'max_grad_norm': 0.0})
    left = {}

    def remember(function):
        def call(run, stage, *arguments, **options):
            left[stage] = function(run, stage, *arguments, **options)
            return left[stage]

        return call

    monkeypatch.setattr(nad, 'fit', remember(nad.fit))
    monkeypatch.setattr(nad, 'fine_tune', remember(nad.fine_tune))

    def call(held_data, name='run', **tuning):
        config.tuning.update(tuning)
        left.clear()
        fitted = DEFENSES['nad'](make_run(name), 'purify/nad', held_data, config)
        return fitted, dict(left)

    return call


def test_a_run_resumes_and_trains_on_nothing_that_is_held_out(purify, held_data, monkeypatch, assert_trees_close):
    suspect = as_numpy(held_data.variables)
    started = time.monotonic()
    fitted, left = purify(held_data, budget=1.0)
    took = time.monotonic() - started
    assert list(left) == [f'purify/nad/{rate}/{part}' for rate in (0.05, 0.1) for part in ('teacher', 'student')]
    teacher, weak, _, strong = left.values()
    # 26 images in batches of 8.
    assert [int(part.state.step) for part in left.values()] == [3, 6, 3, 6]
    assert_trees_close(as_numpy(fitted.state.variables), as_numpy(strong.state.variables))
    kernels = [np.array(part.state.params['Dense_0']['kernel']) for part in (teacher, weak, strong)]
    assert not np.allclose(kernels[1], kernels[2], atol=1e-4)
    assert_trees_close(as_numpy(held_data.variables), suspect)
    assert sum(part.seconds for part in left.values()) < fitted.seconds < took

    # Again in the same directory: everything is loaded, and its time counted.
    def never(*_, **__):
        raise AssertionError('a step was taken')

    with monkeypatch.context() as patch:
        patch.setattr(nad, 'nad_step', never)
        again, loaded = purify(held_data, budget=1.0)
    assert_trees_close(as_numpy(again.state), as_numpy(fitted.state))
    assert_trees_close(as_numpy(loaded['purify/nad/0.05/teacher'].state), as_numpy(teacher.state))
    assert again.seconds > sum(part.seconds for part in left.values())

    # Elsewhere, with held-out images that show nothing: the same students.
    kept, held = defender.hold_out(held_data, 0.2, seed=0)
    training = {image.tobytes() for image in kept.images}
    black = np.array([image if image.tobytes() in training else 0 * image for image in held_data.images])
    assert np.sum(~black.any(axis=(1, 2, 3))) == len(held.labels) > 0
    other, _ = purify(held_data._replace(images=black), 'other', budget=1.0)
    assert_trees_close(as_numpy(other.state.variables), as_numpy(fitted.state.variables))


@pytest.mark.parametrize(('accuracies', 'chosen'), [([0.89, 0.885], 0.1), ([0.89, 0.7], 0.05)])
def test_the_strongest_student_within_the_budget_is_taken(accuracies, chosen, monkeypatch, purify, held_data):
    measured = {}

    def accuracy(run, held, variables):
        np.testing.assert_array_equal(held.labels, defender.hold_out(held_data, 0.2, seed=0)[1].labels)
        measured[len(measured)] = variables
        return accuracies[len(measured) - 1]

    monkeypatch.setattr(defender, 'accuracy', accuracy)
    fitted, left = purify(held_data, budget=0.02)
    assert fitted.state is left[f'purify/nad/{chosen}/student'].state
    assert len(measured) == 2


@pytest.mark.parametrize(
    ('field', 'value', 'sentence'),
    [
        ('learning_rates', (1.0, 0.1), r'nad.learning_rates=\(1.0, 0.1\) must be positive numbers that rise'),
        ('learning_rates', (0.0, 1.0), 'must be positive numbers that rise'),
        ('learning_rates', (), 'must be positive numbers that rise'),
        ('betas', (), 'nad.betas=.* must be weights of one stage or more'),
        ('betas', (-1.0, 2.0), 'none of them negative'),
        ('betas', ('much',), 'nad.betas=.* should be'),
        ('epochs', 0, 'nad.epochs=0 must be positive'),
        ('teacher_epochs', 0, 'nad.teacher_epochs=0 must be positive'),
        ('max_grad_norm', -1.0, 'nad.max_grad_norm=-1.0 must not be negative'),
        ('schedule', 'cosin', "nad.schedule='cosin' does not exist.*Did you mean 'cosine'"),
    ],
)
def test_wrong_values_are_named(config, field, value, sentence):
    config.nad[field] = value
    with pytest.raises(UserError, match=sentence):
        validate(config)
