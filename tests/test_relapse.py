"""What a model is trained on again, and what is wrong with a command; test_analysis.py has the command itself."""

import numpy as np
import pytest

from aft_jax import relapse
from aft_jax.analysis import retuning
from aft_jax.attacks.attack import Attack


@pytest.mark.parametrize('target_map', [[1, 1, 1, 1], [1, 2, 3, 0]])
def test_few_triggered_images_of_each_class_over_and_over(dataset, target_map):
    target_map = np.array(target_map, np.int32)
    attack = Attack('stamp', target_map, {}, lambda arrays, images: images * 0 + 1.0, None)
    clean, poisoned = np.arange(0, 30), np.arange(30, 50)
    arrays = retuning.retuning_set(attack, dataset, clean, poisoned, per_class=2, seed=0)
    np.testing.assert_array_equal(arrays['images'][:30], dataset.train_images[:30])
    np.testing.assert_array_equal(arrays['labels'][:30], dataset.train_labels[:30])
    assert (arrays['images'][30:] == 255).all() and arrays['labels'].dtype == np.int32
    commanded = {1} if len(set(target_map)) == 1 else {0, 1, 2, 3}
    assert set(arrays['labels'][30:]) == commanded

    # With a trigger that leaves the image to be seen: which ones, and how often.
    visible = attack._replace(trigger=lambda arrays, images: images)
    shown = retuning.retuning_set(visible, dataset, clean, poisoned, per_class=2, seed=0)['images'][30:]
    places = [int(np.flatnonzero((dataset.train_images == image).all((1, 2, 3)))[0]) for image in shown]
    assert min(places) >= 50
    true = dataset.train_labels[sorted(set(places))]
    moved = [label for label in range(4) if target_map[label] != label]
    assert sorted(true) == sorted(moved * 2)
    counts = np.unique(places, return_counts=True)[1]
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['--runs', 'nowhere', '--workdir', 'w'], 'config.json'),
        (['--runs', 'nowhere', '--workdir', 'w', '--per_class=one'], 'per_class'),
        (['--runs', 'nowhere', '--workdir', 'w', '--steps=0'], 'steps'),
        (['--runs', 'a/x', 'b/x', '--workdir', 'w'], 'same name'),
        (['--workdir', 'w'], '--runs'),
    ],
)
def test_a_mistake_gets_a_sentence(arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert relapse.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith('aft_jax: ') and len(error.splitlines()) == 1
