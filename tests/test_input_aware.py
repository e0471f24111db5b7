"""The input-aware attack: networks, triggers, both training stages, and resuming. (Against torch: tests/parity.)"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aft_jax import attacks, validation
from aft_jax.attacks import input_aware, input_aware_steps, input_aware_training
from aft_jax.attacks.input_aware_networks import SMALL_WIDTHS, WIDTHS, max_pool, networks_for
from aft_jax.attacks.poison import poison, poisoning_options
from aft_jax.errors import UserError
from aft_jax.runtime.sharding import batch_sharding, make_mesh, replicated
from aft_jax.training import state
from aft_jax.training.loop import fit
from aft_jax.training.stage import Phase, TrainingStage
from aft_jax.training.steps import cross_entropy

GENERATOR = np.random.default_rng(0)


@pytest.fixture
def attack(config, dataset):
    config.attack.name = 'input_aware'
    config.attack.poisoned_share = 0.25
    config.attack.target = 1
    config.attack.input_aware.mask_epochs = 0.3
    config.train.epochs = 1
    return attacks.build(config, dataset.image_shape, dataset.num_classes)


@pytest.fixture
def arrays(dataset):
    return {'images': dataset.train_images, 'labels': dataset.train_labels}


@pytest.fixture
def settings(config, attack, arrays):
    return attacks.attack_settings(config, arrays['images'].shape)


@pytest.fixture
def joint(attack, settings, tiny_net, tiny_variables):
    """Keyword arguments of `joint_step`, the state before it, and its batch; plain SGD shows the gradients."""
    networks = input_aware.Networks(*networks_for((8, 8, 1)))
    classifier_sgd, generator_sgd = optax.sgd(0.1), optax.sgd(1.0)
    bound = {
        'networks': networks,
        'module': tiny_net,
        'optimisers': (classifier_sgd, generator_sgd),
        'target_map': attack.target_map,
        'settings': settings,
    }
    before = input_aware_steps.JointState(
        state.create(tiny_variables, classifier_sgd), state.create(attack.arrays['generator'], generator_sgd)
    )
    images = jnp.asarray(GENERATOR.random((2, 8, 8, 8, 1)).astype(np.float32))
    labels = jnp.asarray(GENERATOR.integers(0, 4, (2, 8)).astype(np.int32))
    batch = {
        'images': images[0],
        'labels': labels[0],
        'second': {'images': images[1], 'labels': labels[1]},
        'constants': attack.arrays['mask'],
    }
    return bound, before, batch


@pytest.mark.parametrize('shape', [(28, 28, 1), (32, 32, 3), (64, 64, 3), (64, 64, 1), (30, 45, 3), (29, 29, 1)])
def test_networks_for_make_maps_of_the_size_of_the_image(shape):
    small = shape[2] == 1 and shape[0] < 64
    for module, channels in zip(networks_for(shape), (shape[2], 1), strict=True):
        assert module.widths == (SMALL_WIDTHS if small else WIDTHS)
        output, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), jnp.zeros((2, *shape), jnp.float32))
        assert output.shape == (2, *shape[:2], channels) and output.dtype == jnp.float32


def test_max_pool_takes_the_largest_of_four():
    x = GENERATOR.random((2, 4, 6, 3)).astype(np.float32)
    for i, j in np.ndindex(2, 3):
        expected = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max(axis=(1, 2))
        np.testing.assert_array_equal(max_pool(x)[:, i, j], expected)


def test_trigger_comes_from_its_source(attack, dataset):
    images = jnp.asarray(dataset.test_images[:4].astype(np.float32) / 255)
    others = images[::-1]
    own = attack.trigger(attack.arrays, images)
    key = jax.random.key(0)
    assert own.min() >= 0 and own.max() <= 1 and not np.allclose(own, images)
    np.testing.assert_array_equal(attack.cross_mode(attack.arrays, images, images, key), own)
    crossing = attack.cross_mode(attack.arrays, images, others, key)
    assert not np.allclose(crossing, own)
    # Pattern and mask are the other image's: (x' - x) / (p - x) is the mask, whatever x is.
    np.testing.assert_allclose(
        crossing - attack.cross_mode(attack.arrays, others, others, key),
        (images - others) * (1 - mask_of(attack, others)),
        atol=1e-5,
    )


def mask_of(attack, images):
    _, network = networks_for(images.shape[1:])
    return input_aware.sharpen(network.apply(attack.arrays['mask'], images))


def test_distance_has_a_gradient_for_equal_images():
    a = jnp.asarray(GENERATOR.random((2, 4, 4, 1)).astype(np.float32))
    b = a.at[1].add(0.5)
    np.testing.assert_allclose(input_aware.distance(a, b), [0, 0.5], atol=1e-6)
    gradient = jax.grad(lambda a: input_aware.diversity(a, b, a, b).sum())(a)
    assert np.isfinite(gradient).all()


def test_poison_changes_no_stored_image(attack, dataset, config):
    poisoned = poison(attack, dataset.train_images, dataset.train_labels, poisoning_options(config))
    assert poisoned.images is dataset.train_images and len(poisoned.indices) == len(poisoned.cross_indices) == 0


def test_joint_step_takes_this_batchs_gradient_of_both_networks(joint, assert_trees_close):
    bound, before, batch = joint
    networks, module = bound['networks'], bound['module']
    step = jax.jit(partial(input_aware_steps.joint_step, **bound))
    key = jax.random.key(5)
    _, dropout_key = jax.random.split(key)

    @jax.jit
    def gradients(current):
        """Written out for a batch of 8, of which two are attacked, towards label 1, and two are in cross mode."""
        x, other = batch['images'], batch['second']['images']
        labels = jnp.concatenate([jnp.ones(2, jnp.int32), batch['labels'][2:]])

        def loss(generator_params, classifier_params):
            sources = jnp.stack([x[0], x[1], other[2], other[3]])
            variables = {'params': generator_params, 'batch_stats': current.generator.batch_stats}
            p, _ = networks.generator.apply(variables, sources, train=True, mutable=['batch_stats'])
            m = jnp.tanh(20 * networks.mask.apply(batch['constants'], sources) - 10) / 2 + 0.5
            mixed = jnp.concatenate([(1 - m) * x[:4] + m * p, x[4:]])
            variables = {'params': classifier_params, 'batch_stats': current.classifier.batch_stats}
            logits, _ = module.apply(
                variables, mixed, train=True, mutable=['batch_stats'], rngs={'dropout': dropout_key}
            )
            pairs = [(0, 2), (1, 3)]
            ratios = [
                jnp.linalg.norm((sources[i] - sources[j]).ravel()) / (jnp.linalg.norm((p[i] - p[j]).ravel()) + 1e-7)
                for i, j in pairs
            ]
            return cross_entropy(logits, labels) + sum(ratios) / 2

        return jax.grad(loss, argnums=(0, 1))(current.generator.params, current.classifier.params)

    current = before
    for _ in range(2):  # a second step would show a sum that is carried along
        for_generator, for_classifier = gradients(current)
        after, metrics = step(current, batch, key)
        moved = jax.tree.map(lambda a, b: b - a, after.generator.params, current.generator.params)
        assert_trees_close(moved, for_generator, atol=1e-4)
        moved = jax.tree.map(lambda a, b: (b - a) / 0.1, after.classifier.params, current.classifier.params)
        assert_trees_close(moved, for_classifier, atol=1e-4)
        current = after
    assert int(current.step) == int(current.generator.step) == 2
    assert {'attacked_accuracy', 'cross_accuracy', 'accuracy', 'diversity'} <= metrics.keys()

    mesh = make_mesh()
    cut = {name: jax.device_put(batch[name], batch_sharding(mesh, 0)) for name in ('images', 'labels', 'second')}
    whole = jax.device_put((before, batch['constants']), replicated(mesh))
    sharded, _ = step(whole[0], cut | {'constants': whole[1]}, key)
    alone, _ = step(before, batch, key)
    assert len(sharded.step.sharding.device_set) == 4
    assert_trees_close(sharded, alone, atol=1e-4)


def test_mask_step_shrinks_the_mask(attack, arrays, settings):
    """Without the weight of diversity, the loss is the cost of the mask alone."""
    settings = settings._replace(input_aware=settings.input_aware._replace(mask_diversity_weight=0.0))
    networks = input_aware.Networks(*networks_for((8, 8, 1)))
    adam = input_aware_training.adam(0.01)
    step = partial(input_aware_steps.mask_step, networks=networks, optimiser=adam, settings=settings)
    images = jnp.asarray(arrays['images'][:8].astype(np.float32) / 255)
    current, call, areas = state.create(attack.arrays['mask'], adam), jax.jit(step), []
    for i in range(20):
        current, metrics = call(current, {'images': images, 'second': {'images': images}}, jax.random.key(i))
        areas.append(float(metrics['mask_area']))
    assert areas[-1] < 0.5 * areas[0]


def test_mask_step_takes_normalised_images(attack, arrays, settings):
    settings = settings._replace(pixel_std=(0.2,))
    networks = input_aware.Networks(*networks_for((8, 8, 1)))
    adam = input_aware_training.adam(0.01)
    images, others = (arrays['images'][i : i + 8].astype(np.float32) / 255 for i in (0, 8))
    batch = {'images': jnp.asarray(images), 'second': {'images': jnp.asarray(others)}}
    before = state.create(attack.arrays['mask'], adam)
    step = jax.jit(partial(input_aware_steps.mask_step, networks=networks, optimiser=adam, settings=settings))
    _, metrics = step(before, batch, jax.random.key(0))
    apply = jax.jit(partial(networks.mask.apply, train=True, mutable=['batch_stats']))
    maps, _ = apply(before.variables, np.concatenate([images, others]))
    masks = np.tanh(20 * np.float64(maps) - 10) / 2 + 0.5

    def distance(a, b):
        return np.sqrt(np.square(np.float64(a) - b).mean((1, 2, 3)))

    diverse = np.mean(distance(images / 0.2, others / 0.2) / (distance(masks[:8], masks[8:]) + 1e-7))
    np.testing.assert_allclose(metrics['diversity'], diverse, rtol=1e-4)
    expected = 100 * np.maximum(masks - 0.032, 0).mean() + diverse
    np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-4)


def test_both_stages_resume_bit_for_bit(
    attack, settings, make_run, arrays, tiny_net, tiny_variables, assert_trees_close
):
    sgd = optax.sgd(0.1)

    def train(run, until):
        with_mask, _ = attacks.train_mask_network(run, attack, arrays, settings)
        training = attacks.prepare_training(with_mask, tiny_net, sgd, state.create(tiny_variables, sgd), settings)
        stage = TrainingStage(
            'infect',
            training.state,
            [Phase(training.step, until)],
            arrays,
            settings.batch_size,
            training.constants,
            training.num_streams,
        )
        fitted = fit(run, stage)
        return fitted.state, training.attack_of(fitted.state)

    whole, whole_attack = train(make_run('whole'), 6)
    assert int(whole.step) == 6 and whole_attack.target_map is attack.target_map
    stages = {path.name for path in (make_run('whole').workdir / 'checkpoints').iterdir()}
    assert stages == {'infect_mask', 'infect'}
    train(make_run('cut'), 2)
    resumed, resumed_attack = train(make_run('cut'), 6)
    assert_trees_close(resumed, whole)
    assert_trees_close(resumed_attack.arrays, whole_attack.arrays)
    before = jax.tree.leaves(attack.arrays)
    moved = [not np.array_equal(a, b) for a, b in zip(before, jax.tree.leaves(whole_attack.arrays), strict=True)]
    assert all(moved)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'input_aware.mask_epochs': 0.0}, 'mask_epochs'),
        ({'input_aware.mask_density': 1.0}, 'mask_density'),
        ({'input_aware.generator_learning_rate': -1.0}, 'generator_learning_rate'),
        ({'input_aware.diversity_weight': -1.0}, 'diversity_weight'),
        ({'poisoned_share': 0.6}, 'at most 0.5'),
        ({'poisoned_share': 0.01}, 'without an attacked or a cross image'),
    ],
)
def test_validate_rejects_options(config, options, message):
    config.attack.name, config.dataset = 'input_aware', 'mnist5k'
    config.attack.update_from_flattened_dict(options)
    with pytest.raises(UserError, match=message):
        validation.validate(config)
