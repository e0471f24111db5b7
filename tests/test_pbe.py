"""PBE: its score and its subsets against NumPy, what it trains on, and how well it detects poisoned images."""

import numpy as np
import pytest
from defense_runs import record_stages, run_defense

from aft_jax.attacks.attack import Attack
from aft_jax.attacks.poison import NO_INDICES, Poisoned, poisoning_options, published_training_set
from aft_jax.config import resolve
from aft_jax.defenses import DefenderData, pbe
from aft_jax.errors import UserError
from aft_jax.evaluation.scores import poison_detection
from aft_jax.pipeline.stages import defense_settings
from aft_jax.validation import validate


def test_consistency_is_the_cosine_of_the_logits():
    generator = np.random.default_rng(0)
    before, after = generator.normal(size=(2, 5, 3)).astype(np.float32)
    before[4] = 0
    expected = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(before[:4], after[:4], strict=True)] + [0]
    np.testing.assert_allclose(pbe.consistency(before, after), expected, rtol=0, atol=1e-6)


def test_highest_by_label_takes_equally_many_of_every_label():
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 1, 2], np.int32)
    scores = np.array([0.1, 0.9, -1.0, 0.9, 0.5, -0.5, -0.2, -0.9, -2.0], np.float32)
    np.testing.assert_array_equal(pbe.highest_by_label(scores, labels, 3), np.array([1, 6, 8], np.int32), strict=True)
    # Label 2 has one image and label 1 has three, so more of label 0 are taken.
    np.testing.assert_array_equal(pbe.highest_by_label(scores, labels, 5), [1, 3, 5, 6, 8])
    np.testing.assert_array_equal(pbe.highest_by_label(scores, labels, 8), [0, 1, 3, 4, 5, 6, 7, 8])
    np.testing.assert_array_equal(pbe.highest_by_label(scores, labels, 9), np.arange(9))


def test_highest_by_label_takes_the_right_number():
    generator = np.random.default_rng(0)
    for count in range(1, 40):
        labels = generator.geometric(0.3, 40)
        chosen = pbe.highest_by_label(generator.normal(size=40), labels, count)
        assert len(np.unique(chosen)) == count
        selected, present = (np.bincount(x, minlength=labels.max() + 1) for x in (labels[chosen], labels))
        assert all(selected[k] == present[k] or selected[k] >= selected.max() - 1 for k in np.unique(labels))


@pytest.fixture
def pbe_config(config):
    config.pbe.first_epochs = 1
    config.pbe.epochs = 1  # adversarial throughout, so that each round compiles one step
    config.pbe.adversarial_epochs = 1.0
    config.pbe.update({'pgd_steps': 1, 'universal': 'linf', 'per_image': ''})  # the fewer, the less to compile
    config.pbe.keep = (0.3, 0.5)
    config.pbe.first_share = 0.2
    return config


def test_purify_trains_each_round_on_what_the_round_before_kept(
    pbe_config, make_run, tiny_net, tiny_variables, dataset, monkeypatch
):
    recorded = record_stages(monkeypatch)
    data = DefenderData(tiny_net, tiny_variables, dataset.train_images, dataset.train_labels)
    run = make_run(devices=1)
    purified = run_defense('pbe', run, data, pbe_config)
    subsets, scores = purified.poison_scores
    assert list(recorded) == [f'purify/pbe/round{i}' for i in (1, 2, 3)]
    assert [len(subset) for subset in subsets] == [16, 24, 40] and len(scores) == 3
    stages = [stage for stage, _ in recorded.values()]
    for subset, stage in zip(subsets, stages, strict=True):
        np.testing.assert_array_equal(stage.arrays['images'], dataset.train_images[subset])
        np.testing.assert_array_equal(stage.arrays['labels'], dataset.train_labels[subset])
        # Every round starts at the infected model, and is held to it.
        for variables in (stage.state.variables, stage.constants):
            kernel = variables['params']['Dense_0']['kernel']
            np.testing.assert_array_equal(kernel, tiny_variables['params']['Dense_0']['kernel'])
    for subset, score in zip(subsets[1:], scores, strict=False):
        for label in np.unique(dataset.train_labels):
            members = np.flatnonzero(dataset.train_labels == label)
            chosen = np.intersect1d(members, subset)
            assert score[chosen].min() >= score[np.setdiff1d(members, chosen)].max()
    assert [stage.total for stage in stages] == [2, 3, 5]
    _, (_, last) = recorded.popitem()
    np.testing.assert_array_equal(
        purified.variables['params']['Dense_0']['kernel'], last.state.variables['params']['Dense_0']['kernel']
    )

    # A second start takes no step, and comes to the same.
    again = run_defense('pbe', run._replace(must_be_finished=True), data, pbe_config).poison_scores
    for first, second in zip(scores + subsets, again.scores + again.subsets, strict=True):
        np.testing.assert_array_equal(first, second)


def test_first_round_trains_on_adversarial_examples_alone(pbe_config):
    options = defense_settings('pbe', resolve(pbe_config)).options
    first = pbe.first_round(options)
    assert (first.adversarial_share, first.distillation, first.cutmix, first.recalibrate) == (1.0, 0.0, 0.0, False)
    assert (first.epochs, first.adversarial_epochs, first.learning_rate) == (1, 1, 0.1)
    assert options.aft.distillation > 0 and options.aft.adversarial_share < 1
    assert first.eps == options.aft.eps and first.universal == 'linf'


def test_poison_detection_compares_with_the_poisoned_indices():
    found = poison_detection(
        [np.array([0.1, 0.9, 0.2, 0.8]), np.array([0.9, 0.1, 0.2, 0.3])],
        [np.array([0, 1]), np.array([1, 3])],
        np.array([0, 2]),
    )
    assert found.poisoned_shares == (0.5, 0.0)
    assert found.aucs == (1.0, 0.25)
    assert np.isnan(poison_detection([np.ones(4)], [np.arange(4)], NO_INDICES).aucs[0])


def test_published_training_set_is_poisoned_if_the_attacker_controlled_the_training(config, dataset):
    attack = Attack(
        'badnets', np.zeros(4, np.int32), {}, lambda arrays, images: images * 0 + 1.0, None, trigger_is_trained=True
    )
    images, labels = dataset.train_images, dataset.train_labels
    whole = Poisoned(images, labels, NO_INDICES, NO_INDICES)
    left = published_training_set(attack, images, labels, whole, poisoning_options(config))
    assert len(left.indices) == 8
    assert (left.images[left.indices] == 255).all() and (left.labels[left.indices] == 0).all()
    others = np.setdiff1d(np.arange(80), left.indices)
    np.testing.assert_array_equal(left.images[others], images[others])
    fixed = whole._replace(indices=np.array([3], np.int32))
    assert published_training_set(attack, images, labels, fixed, poisoning_options(config)) is fixed
    assert published_training_set(None, images, labels, whole, poisoning_options(config)) is whole


@pytest.mark.parametrize(
    'field, value, match',
    [
        ('first_share', 0.0, 'pbe.first_share=0.0 is a share: above 0'),
        ('keep', (0.2, 1.5), r'pbe.keep=\(0.2, 1.5\) is a share'),
        ('first_epochs', 0, 'pbe.first_epochs=0 must be positive'),
        ('first_learning_rate', -0.1, 'pbe.first_learning_rate=-0.1 must be positive'),
        ('adversarial_epochs', 9.0, 'pbe.adversarial_epochs=9.0 is more than pbe.epochs=4'),
        ('distillation', 0.0, 'pbe.cutmix=1.0 leaves clean images without labels'),
        ('universal', 'linf,wrap', "Did you mean 'warp'"),
    ],
)
def test_validate_names_wrong_values(config, field, value, match):
    config.pbe[field] = value
    with pytest.raises(UserError, match=match):
        validate(config)
