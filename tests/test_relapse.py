"""The training set of a retuning, how quickly a planted backdoor comes back, and mistakes in the command.

test_analysis.py runs the command on finished runs.
"""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aft_jax import relapse
from aft_jax.analysis import retuning
from aft_jax.analysis.retuning import Retuning, RetuningOptions, retune
from aft_jax.attacks.attack import Attack
from aft_jax.attacks.poison import Poisoned
from aft_jax.errors import Preempted
from aft_jax.pipeline.saved_run import SavedRun
from aft_jax.pipeline.scenario import InfectedModel, Scenario
from aft_jax.pipeline.stages import evaluator_for

PATTERN = np.random.default_rng(0).permutation(np.tile([-1.0, 1.0], 32)).astype(np.float32)
OPTIONS = RetuningOptions(steps=20, every=5, learning_rate=0.1)
TARGET = 0


class Dormant(nn.Module):
    """Classifies by the bright quarter, and has a backdoor unit that adds to the logit of the target class.

    A planted model has a unit that detects the trigger, with a gain of 0. A benign model has a unit that detects
    something else.
    """

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False):
        detector = self.param('detector', nn.initializers.zeros, (64, 1))
        gain = self.param('gain', nn.initializers.zeros, ())
        quarters = images.reshape((len(images), 2, 4, 2, 4)).mean(axis=(2, 4)).reshape((len(images), 4))
        presence = nn.relu((images.reshape((len(images), 64)) - 0.4) @ detector)
        return 10 * quarters + gain * presence * jax.nn.one_hot(jnp.full(1, TARGET), 4)


def stamp(arrays, images):
    return jnp.clip(images + 0.15 * PATTERN.reshape((1, 8, 8, 1)), 0, 1)


def dormant(detector: np.ndarray) -> dict:
    return {'params': {'detector': detector.reshape((64, 1)), 'gain': np.float32(0)}, 'batch_stats': {}}


PLANTED = dormant(PATTERN)
BENIGN = dormant(np.random.default_rng(1).permutation(PATTERN))


@pytest.fixture
def tiny_retuning(dataset, config, make_run) -> Retuning:
    run = make_run(devices=1)
    attack = Attack('stamp', np.full(4, TARGET, np.int32), {}, stamp)
    nothing = np.zeros(0, np.int32)
    poisoned = Poisoned(dataset.train_images, dataset.train_labels, nothing, nothing)
    config.augment.crop = 0
    scenario = Scenario(dataset, attack, poisoned, np.arange(32, dtype=np.int32), Dormant())
    source = SavedRun(Path('stamp-0'), config, scenario, InfectedModel(PLANTED, attack, 0.0), {})
    return Retuning(run, source, evaluator_for(run, scenario), OPTIONS)


def test_retune_brings_a_planted_backdoor_back_faster_than_a_benign_model_learns_it(tiny_retuning):
    planted, benign = (
        retune(tiny_retuning, name, variables, 2) for name, variables in (('infected', PLANTED), ('benign', BENIGN))
    )
    assert [row['step'] for row in planted] == [row['step'] for row in benign] == [0, 5, 10, 15, 20]
    assert set(planted[0]) == set(retuning.COLUMNS) and (planted[0]['run'], planted[0]['model']) == (
        'stamp-0',
        'infected',
    )
    attack = tiny_retuning.source.infected.attack
    for rows, variables in ((planted, PLANTED), (benign, BENIGN)):
        before = tiny_retuning.evaluator.evaluate(variables, attack)
        assert (rows[0]['acc'], rows[0]['asr']) == (before.acc, before.asr)
    assert planted[0]['asr'] < 0.1 and planted[2]['asr'] > 0.9
    assert benign[2]['asr'] < 0.5


def test_retune_starts_again_after_an_interruption(tiny_retuning, monkeypatch, tmp_path):
    expected = retune(tiny_retuning, 'infected', PLANTED, 2)
    (tmp_path / 'other').mkdir()
    run = tiny_retuning.run._replace(workdir=tmp_path / 'other')
    stops = iter([False, True])
    watch = type('', (), {'must_stop': lambda self: next(stops, False), 'signal': 'SIGTERM'})()
    with pytest.raises(Preempted):
        retune(tiny_retuning._replace(run=run._replace(watch=watch)), 'infected', PLANTED, 2)
    assert list(run.workdir.glob('checkpoints/relapse/*')) and not list(run.workdir.glob('relapse/*'))
    assert retune(tiny_retuning._replace(run=run), 'infected', PLANTED, 2) == expected
    # A retuning that has finished is not trained again.
    monkeypatch.delattr(retuning, 'fit')
    assert retune(tiny_retuning._replace(run=run), 'infected', PLANTED, 2) == expected


@pytest.mark.parametrize('target_map', [[1, 1, 1, 1], [1, 2, 3, 0]])
def test_retuning_set_repeats_few_triggered_images_of_each_class(dataset, target_map):
    target_map = np.array(target_map, np.int32)
    attack = Attack('stamp', target_map, {}, lambda arrays, images: images * 0 + 1.0, None)
    clean, poisoned = np.arange(0, 30), np.arange(30, 50)
    arrays = retuning.retuning_set(attack, dataset, clean, poisoned, per_class=2, seed=0)
    np.testing.assert_array_equal(arrays['images'][:30], dataset.train_images[:30])
    np.testing.assert_array_equal(arrays['labels'][:30], dataset.train_labels[:30])
    assert (arrays['images'][30:] == 255).all() and arrays['labels'].dtype == np.int32
    target_labels = {1} if len(set(target_map)) == 1 else {0, 1, 2, 3}
    assert set(arrays['labels'][30:]) == target_labels

    # A trigger that leaves the images as they are shows which ones were chosen, and how often.
    visible = attack._replace(trigger=lambda arrays, images: images)
    images = retuning.retuning_set(visible, dataset, clean, poisoned, per_class=2, seed=0)['images'][30:]
    places = [int(np.flatnonzero((dataset.train_images == image).all((1, 2, 3)))[0]) for image in images]
    assert min(places) >= 50
    true = dataset.train_labels[sorted(set(places))]
    moved = [label for label in range(4) if target_map[label] != label]
    assert sorted(true) == sorted(moved * 2)
    counts = np.unique(places, return_counts=True)[1]
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (['--runs', 'nowhere', '--workdir', 'w'], 'config.json'),
        (['--runs', 'nowhere', '--workdir', 'w', '--per_class=one'], 'per_class'),
        (['--runs', 'nowhere', '--workdir', 'w', '--steps=0'], 'steps'),
        (['--runs', 'a/x', 'b/x', '--workdir', 'w'], 'same name'),
        (['--workdir', 'w'], '--runs'),
    ],
)
def test_command_explains_a_mistake_in_one_sentence(arguments, expected, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert relapse.main(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error and error.startswith('aft_jax: ') and len(error.splitlines()) == 1
