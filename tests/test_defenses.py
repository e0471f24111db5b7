"""What fine-tuning does and what it leaves alone; what all defenses share: options, held-out images, the choice."""

import jax
import numpy as np
import pytest
import scipy.special
from defense_runs import lines, run_defense
from toys import Linear

from aft_jax.config import resolve
from aft_jax.defenses import DEFENSES, DefenderData, defender
from aft_jax.errors import Preempted
from aft_jax.pipeline.stages import defense_settings


def cross_entropy(z, labels):
    return -scipy.special.log_softmax(z, axis=1)[np.arange(len(z)), labels].mean()


def test_ft_lowers_the_loss_and_leaves_the_infected_model_alone(purify, held_data, tiny_net):
    after, record = purify('ft', epochs=10, learning_rates=(0.05,))
    assert len(record) == 30
    images = held_data.images.astype(np.float32) / 255
    before, now = (
        cross_entropy(np.asarray(tiny_net.apply(v, images)), held_data.labels) for v in (held_data.variables, after)
    )
    assert now < 0.5 * before
    assert np.mean([line['loss'] for line in record[-3:]]) < 0.5 * np.mean([line['loss'] for line in record[:3]])


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
    if name == 'pbe':
        values |= values.pop('aft')._asdict()
    section = config[name].to_dict()
    section.pop('preset', None)
    assert values == {field: tuple(v) if isinstance(v, list) else v for field, v in section.items()}
    hash(options)  # jitted steps are cached by it


class StopsAfter:
    """A watch that lets a run take a number of calls and then stops it."""

    signal = 15

    def __init__(self, calls: int):
        self.left = calls

    def must_stop(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('ft_sam', {'epochs': 2}),
        ('d3', {'epochs': 2}),
        ('sau', {'epochs': 2, 'steps': 2}),
        ('rnp', {'unlearning_epochs': 2, 'recovering_epochs': 2}),
        ('i_bau', {'rounds': 1, 'fixed_point_steps': 2}),
    ],
)
def test_purify_stopped_and_started_again_equals_an_uninterrupted_run(
    name, options, config, make_run, held_data, assert_trees_close
):
    """It stops after two steps, and again before its end."""
    config[name].update(options)
    whole, cut = make_run('whole'), make_run('cut')
    expected = run_defense(name, whole, held_data, config)
    for _ in range(2):
        with pytest.raises(Preempted):
            run_defense(name, cut._replace(watch=StopsAfter(1)), held_data, config)
    actual = run_defense(name, cut, held_data, config)
    assert_trees_close(actual.variables, expected.variables)
    assert lines(cut) == lines(whole) and len(lines(whole)) >= 6


def test_choose_measures_candidates_on_the_held_out_images(make_run, held_data):
    """Biases that make each candidate predict one class alone."""
    held = held_data._replace(labels=np.array([0] * 10 + [1] * 12 + [2] * 2, np.int32))

    def constant(label):
        zeros = jax.tree.map(np.zeros_like, held.variables)
        zeros['params']['Dense_1']['bias'] = np.eye(4, dtype=np.float32)[label]
        return zeros

    choice = defender.choose(make_run(), held, map(constant, (1, 0, 2)), defender.TuningOptions(0.2, budget=0.1))
    assert choice.chosen == 1 and choice.accuracy == pytest.approx(10 / 24)
