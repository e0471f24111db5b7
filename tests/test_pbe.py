"""PBE: its score and its subsets against NumPy, what it trains on, and how its finds are judged."""

import numpy as np
import pytest

from aft_jax.attacks.attack import Attack
from aft_jax.attacks.poison import NO_INDICES, Poisoned, poisoning_options, published_training_set
from aft_jax.config import resolve
from aft_jax.defenses import DefenderData, aft, pbe
from aft_jax.errors import UserError
from aft_jax.evaluation.scores import poison_detection
from aft_jax.pipeline.stages import defender_config
from aft_jax.validation import validate


def test_consistency_is_the_cosine_of_the_logits():
    generator = np.random.default_rng(0)
    before, after = generator.normal(size=(2, 5, 3)).astype(np.float32)
    before[4] = 0
    expected = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(before[:4], after[:4], strict=True)] + [0]
    np.testing.assert_allclose(pbe.consistency(before, after), expected, rtol=0, atol=1e-6)


def test_every_label_gives_as_many_of_its_highest_scores():
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 1, 2], np.int32)
    scores = np.array([0.1, 0.9, -1.0, 0.9, 0.5, -0.5, -0.2, -0.9, -2.0], np.float32)
    np.testing.assert_array_equal(pbe.highest_by_label(scores, labels, 3), np.array([1, 6, 8], np.int32), strict=True)
    # Label 2 has one image, label 1 three: what they lack, label 0 gives.
    np.testing.assert_array_equal(pbe.highest_by_label(scores, labels, 5), [1, 3, 5, 6, 8])
    np.testing.assert_array_equal(pbe.highest_by_label(scores, labels, 8), [0, 1, 3, 4, 5, 6, 7, 8])
    np.testing.assert_array_equal(pbe.highest_by_label(scores, labels, 9), np.arange(9))


def test_as_many_are_taken_as_were_asked_for():
    generator = np.random.default_rng(0)
    for count in range(1, 40):
        labels = generator.geometric(0.3, 40)
        chosen = pbe.highest_by_label(generator.normal(size=40), labels, count)
        assert len(np.unique(chosen)) == count
        taken, there = (np.bincount(x, minlength=labels.max() + 1) for x in (labels[chosen], labels))
        assert all(taken[k] == there[k] or taken[k] >= taken.max() - 1 for k in np.unique(labels))


@pytest.fixture
def options(config):
    config.pbe.first_epochs = 1
    config.pbe.epochs = 2
    config.pbe.adversarial_epochs = 1.0
    config.pbe.pgd_steps = 1
    config.pbe.keep = (0.3, 0.5)
    config.pbe.first_share = 0.2
    return defender_config(resolve(config), 'pbe')


def test_rounds_train_on_what_the_round_before_kept(options, make_run, tiny_net, tiny_variables, dataset, monkeypatch):
    seen = []
    fit = aft.fit

    def watched(run, stage, state, phases, arrays, *args, **kwargs):
        model = state.classifier.params['Dense_0']['kernel'], kwargs['constants']['params']['Dense_0']['kernel']
        ends = [(phase.until, phase.step.keywords['recipe']) for phase in phases]
        seen.append((stage, arrays['images'], arrays['labels'], model, ends))
        return fit(run, stage, state, phases, arrays, *args, **kwargs)

    monkeypatch.setattr(aft, 'fit', watched)
    held_data = DefenderData(tiny_net, tiny_variables, dataset.train_images, dataset.train_labels)
    run = make_run(devices=1)
    erased = pbe.purify(run, 'purify/pbe', held_data, options)
    assert [stage for stage, *_ in seen] == [f'purify/pbe/round{i}' for i in (1, 2, 3)]
    assert [len(subset) for subset in erased.subsets] == [16, 24, 40] and len(erased.scores) == 3
    for subset, (_, images, labels, *_) in zip(erased.subsets, seen, strict=True):
        np.testing.assert_array_equal(images, dataset.train_images[subset])
        np.testing.assert_array_equal(labels, dataset.train_labels[subset])
    for subset, score in zip(erased.subsets[1:], erased.scores, strict=False):
        for label in np.unique(dataset.train_labels):
            members = np.flatnonzero(dataset.train_labels == label)
            chosen = np.intersect1d(members, subset)
            assert score[chosen].min() >= score[np.setdiff1d(members, chosen)].max()
    # Every round starts at the suspect model, and is held to it.
    for *_, models, _ in seen:
        for model in models:
            np.testing.assert_array_equal(model, tiny_variables['params']['Dense_0']['kernel'])
    # The first is adversarial throughout, the others are AFT: for an epoch of two.
    assert [[until for until, _ in ends] for *_, ends in seen] == [[2, 2], [3, 6], [5, 10]]
    first, *others = ([recipe for _, recipe in ends] for *_, ends in seen)
    assert (first[0].adversarial_share, first[0].distillation, first[0].cutmix) == (1.0, 0.0, 0.0)
    for adversarial, clean in others:
        assert adversarial == aft.recipe_of(options.pbe, options.augment, dataset.image_shape)
        assert adversarial.distillation > 0 and clean.adversarial_share == 0

    # A second start finds everything there, and comes to the same.
    again = pbe.purify(run, 'purify/pbe', held_data, options)
    for first, second in zip(erased.scores + erased.subsets, again.scores + again.subsets, strict=True):
        np.testing.assert_array_equal(first, second)


def test_finds_are_judged_by_who_was_poisoned():
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
def test_a_wrong_recipe(config, field, value, match):
    config.pbe[field] = value
    with pytest.raises(UserError, match=match):
        validate(config)
