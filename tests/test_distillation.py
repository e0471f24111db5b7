"""NAD: its distance and its step against NumPy, and what a whole run trains and chooses."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from defense_runs import as_numpy, run_twice

from aft_jax.data.augment import AugmentOptions
from aft_jax.defenses import DefenderData, nad
from aft_jax.errors import UserError
from aft_jax.training import state
from aft_jax.training.optimiser import sgd
from aft_jax.validation import validate

BETAS = (500.0, 1000.0, 1000.0)
NO_AUGMENTATION = AugmentOptions(crop=0, flip=False, rotation=0.0)


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


def attention(features):
    """The paper's: where the energy of an image lies."""
    energy = (features.astype(np.float64) ** 2).sum(axis=3)
    return energy / np.sqrt((energy**2).sum(axis=(1, 2)))[:, None, None]


def distances(ours, theirs):
    return [((attention(a) - attention(b)) ** 2).mean() for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize(('stages', 'betas'), [(3, BETAS), (4, (1.0, 20.0, 300.0)), (2, (1.0, 20.0, 300.0))])
def test_attention_distance_equals_numpy(stages, betas):
    """The last stages, or as many as there are; the last beta belongs to the last stage."""
    shapes = [(2, 8, 8, 3), (2, 4, 4, 5), (2, 4, 2, 6), (2, 2, 2, 7)][:stages]
    ours, theirs = maps(1, *shapes), maps(2, *shapes)
    count = min(3, stages)
    expected = np.dot(betas[-count:], distances(ours, theirs)[-count:])
    np.testing.assert_allclose(nad.attention_distance(ours, theirs, betas), expected, rtol=1e-5)


def test_attention_distance_has_no_gradient_at_the_teacher_and_none_at_zero():
    (ours, theirs) = maps(3, (2, 4, 4, 3), (2, 4, 4, 3))
    slope = jax.grad(lambda one, other: nad.attention_distance([one], [other], [1e6]))
    assert not np.any(slope(ours, ours))
    assert np.abs(slope(ours, theirs)).max() > 1
    assert not np.any(slope(np.zeros_like(ours), theirs))


def test_nad_step_equals_numpy():
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
    optimiser = sgd(rate, 'constant', 1, momentum=0.9, weight_decay=0.0)
    step = partial(nad.nad_step, module=Looking(), optimiser=optimiser, betas=(3.0, 50.0), augmentation=NO_AUGMENTATION)
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
    """32 clean images and a fresh network as the infected model."""
    variables = Looking().init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    return DefenderData(Looking(), variables, dataset.train_images[:32], dataset.train_labels[:32])


@pytest.fixture
def nad_config(config):
    config.nad.update({'teacher_epochs': 1, 'epochs': 2, 'learning_rates': (0.05, 0.1), 'max_grad_norm': 0.0})
    return config


def test_purify_trains_a_teacher_and_a_student_for_each_rate(nad_config, make_run, held_data, monkeypatch):
    nad_config.tuning.budget = 1.0
    purified, trained = run_twice('nad', make_run(), held_data, nad_config, monkeypatch)
    assert list(trained) == [f'purify/nad/{rate}/{part}' for rate in (0.05, 0.1) for part in ('teacher', 'student')]
    assert [int(fitted.state.step) for _, fitted in trained.values()] == [3, 6, 3, 6]  # 26 images in batches of 8
    (_, teacher), (weak_stage, weak), _, (_, strong) = trained.values()
    jax.tree.map(np.testing.assert_array_equal, as_numpy(purified.variables), as_numpy(strong.state.variables))
    jax.tree.map(np.testing.assert_array_equal, as_numpy(weak_stage.constants), as_numpy(teacher.state.variables))
    kernels = [np.array(fitted.state.params['Dense_0']['kernel']) for fitted in (teacher, weak, strong)]
    assert not np.allclose(kernels[1], kernels[2], atol=1e-4)


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
def test_validate_names_wrong_values(config, field, value, sentence):
    config.nad[field] = value
    with pytest.raises(UserError, match=sentence):
        validate(config)
