"""Measurements of the observation against NumPy, and the infection score of networks with a planted backdoor."""

import csv
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from experiment_results import searched

from aft_jax import relapse, scan_runs
from aft_jax.analysis import __main__ as command
from aft_jax.analysis import observation_table, scan_stage, scan_table
from aft_jax.analysis.backdoor_scan import Scan, choose_scan_images, scan_fields
from aft_jax.analysis.connection import MeasuredImages, connection, evaluate, evenly
from aft_jax.analysis.infection_score import (
    BackdoorHypothesis,
    InfectionScore,
    Scorer,
    classify_confusions,
    count_moves,
    share_moved,
    shared_perturbations,
)
from aft_jax.analysis.measures import correlations, jaccard, neuron_overlap, target_share
from aft_jax.analysis.probe import ModelProbe
from aft_jax.attacks.attack import triggered
from aft_jax.cli import EXIT_USER_ERROR
from aft_jax.config import default_config
from aft_jax.errors import UserError
from aft_jax.evaluation import bootstrap
from aft_jax.evaluation.roc import auc
from aft_jax.experiment import run_experiment
from aft_jax.pipeline import saved_run
from aft_jax.runtime.sharding import make_mesh
from aft_jax.training.prediction import BatchedFunction, float_images

CLASSES, SIDE = 4, 12
ROWS = SIDE // CLASSES


class Planted(nn.Module):
    """Classifies by bright rows, and has a backdoor unit for a pattern that is hidden in the noise of all pixels.

    The logit of class y is the brightness of its rows. The backdoor unit adds `weight` times the presence of the
    pattern: to the logit of class 0 (all2one), or to the logit of the next class, in proportion to the evidence for
    the class (all2all). Both are variables, so that all tests share the compiled functions.
    """

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, features: bool = False):
        weight, all2all = (self.param(name, nn.initializers.zeros, ()) for name in ('weight', 'all2all'))
        bright = images.reshape((len(images), CLASSES, -1)).mean(axis=-1)
        flat = (images - 0.5).reshape((len(images), -1))
        presence = flat @ jnp.asarray(PATTERN.reshape((-1, 1))) / SIDE**2
        following = jnp.roll(jax.nn.softmax(40 * bright), 1, axis=1)
        target = jax.nn.one_hot(jnp.zeros(1, jnp.int32), CLASSES)
        logits = 40 * bright + weight * presence * (all2all * following + (1 - all2all) * target)
        maps = jnp.concatenate([bright, presence], axis=1)[:, None, None]
        return (logits, (maps,)) if features else logits


def planted(weight: float, all2all: bool = False) -> dict:
    """Builds variables of `Planted`."""
    return {'params': {'weight': np.float32(weight), 'all2all': np.float32(all2all)}}


class SmallNet(nn.Module):
    """A network that trains in a moment, with one feature map."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, features: bool = False):
        maps = nn.relu(nn.Dense(16)(images.reshape((len(images), -1)) - 0.5))
        logits = nn.Dense(self.num_classes)(maps)
        return (logits, (maps[:, None, None],)) if features else logits


def make_small_net(num_classes: int, mean, std) -> nn.Module:
    """Builds the network of the finished runs."""
    return SmallNet(num_classes)


# Rows are balanced, so that the pattern makes no class brighter.
PATTERN = np.random.default_rng(4).permuted(np.tile([-1.0, 1.0], (SIDE, SIDE // 2)), axis=1).astype(np.float32)


def striped(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws noise with three brighter rows that show the class: uint8 [count, 12, 12, 1] and int32 [count]."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(count) % CLASSES).astype(np.int32)
    images = generator.normal(110, 12, (count, CLASSES, ROWS, SIDE))
    images[np.arange(count), labels] += 40
    return np.clip(images, 0, 255).round().astype(np.uint8).reshape((count, SIDE, SIDE, 1)), labels


def stamped(images: np.ndarray) -> np.ndarray:
    return np.clip(images + 20 * PATTERN[..., None], 0, 255).astype(np.uint8)


def probe_for(batch_size: int = 64, devices: int = 4) -> ModelProbe:
    return ModelProbe(Planted(), make_mesh(jax.devices()[:devices]), batch_size, steps=3)


@pytest.fixture(scope='module')
def probe() -> ModelProbe:
    return probe_for()


@pytest.fixture(scope='module')
def scorer(probe) -> Scorer:
    return Scorer(probe, Planted(), make_mesh(), 64)


# --- the bootstrap, the ROC


def test_bootstrap_interval_covers_the_truth_as_often_as_it_should():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        estimate = bootstrap.mean(generator.exponential(size=80), seed=trial, resamples=300)
        hits += estimate.low <= 1 <= estimate.high
    assert 0.89 <= hits / 300 <= 0.98  # percentiles cover a little less than 95 % of a skewed mean


def test_bootstrap_interval_is_that_of_scipy():
    values = np.random.default_rng(1).normal(size=200)
    estimate = bootstrap.mean(values, resamples=4000)
    expected = scipy.stats.bootstrap((values,), np.mean, n_resamples=4000, method='percentile', rng=2)
    np.testing.assert_allclose(estimate[1:], expected.confidence_interval, atol=0.02)
    assert estimate.value == pytest.approx(values.mean(), abs=1e-12)


def test_bootstrap_mean_without_images_is_nan():
    assert all(math.isnan(x) for x in bootstrap.mean(np.zeros(0)))


def test_auc_is_the_mann_whitney_statistic():
    generator = np.random.default_rng(3)
    positives, negatives = generator.integers(2, 9, 30), generator.integers(0, 7, 17)  # with ties
    expected = scipy.stats.mannwhitneyu(positives, negatives).statistic / (30 * 17)
    assert auc(positives, negatives) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(auc(positives, np.zeros(0)))


# --- the measurements


def test_target_share_counts_fooling_examples_of_other_classes():
    labels = np.array([0, 1, 1, 2, 2, 3])
    predictions = np.array([1, 0, 1, 0, 3, 0])
    # all2one: the image of class 0 does not count, and the second one of class 1 does not fool; 0, 0, 3, 0 remain.
    assert target_share(predictions, labels, np.zeros(4, np.int32)).value == 3 / 4
    # all2all: 0 -> 1, 2 -> 3 and 3 -> 0, of five that fool.
    assert target_share(predictions, labels, np.array([1, 2, 3, 0])).value == pytest.approx(3 / 5)
    assert math.isnan(target_share(labels, labels, np.array([1, 2, 3, 0])).value)


def test_neuron_overlap_by_hand():
    generator = np.random.default_rng(5)
    clean, triggered, adversarial = generator.normal(size=(3, 50, 40))
    triggered[:, :6] += 3
    adversarial[:, 3:9] += 3
    overlap = neuron_overlap(clean, triggered, adversarial)
    by_trigger, by_perturbation = (triggered - clean).mean(0), (adversarial - clean).mean(0)
    for k, estimate in ((2, overlap.top_5), (4, overlap.top_10)):
        a, b = (set(np.argsort(-x)[:k]) for x in (by_trigger, by_perturbation))
        assert estimate.value == pytest.approx(len(a & b) / len(a | b))
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert overlap.correlation.value == pytest.approx(np.corrcoef(by_trigger, by_perturbation)[0, 1])
    assert overlap.correlation.low < overlap.correlation.value < overlap.correlation.high


def test_jaccard_and_correlations_of_rows():
    a = np.array([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    b = np.array([[9.0, 0.0, 5.0, 1.0], [2.0, 3.0, 0.0, 0.0]])
    np.testing.assert_allclose(jaccard(a, b, 2), [1 / 3, 1.0])
    assert np.isnan(correlations(a, np.ones_like(a))).all()


@pytest.mark.parametrize(('channel', 'expected'), [(2, 1.0), (3, 0.0)])
def test_neuron_overlap_of_few_channels_compares_at_least_one(channel, expected):
    clean = np.zeros((5, 4))
    triggered, adversarial = clean.copy(), clean.copy()
    triggered[:, 2] = adversarial[:, channel] = 1.0
    overlap = neuron_overlap(clean, triggered, adversarial)
    assert overlap.top_5 == overlap.top_10 == (expected, expected, expected)


def test_evaluate_a_planted_model(probe):
    """Distances and channels against NumPy. The trigger and PGD activate the same unit."""
    images, labels = striped(60, 6)
    measured = MeasuredImages(images, stamped(images), labels, np.zeros(CLASSES, np.int32))
    counted = measured.counted
    assert (counted.labels != 0).all() and len(counted.labels) == (labels != 0).sum()
    adversarial = probe.adversarial(planted(400), counted.clean, counted.labels, 'linf', 16 / 255)
    assert np.abs(adversarial - counted.clean / 255).max() == pytest.approx(16 / 255, abs=1e-6)
    actual = evaluate(probe, planted(400), adversarial, measured)
    assert actual.fooled > 0.9 and actual.target_share.value > 0.95

    def maps(x):
        bright = x.reshape((len(x), CLASSES, -1)).mean(-1)
        presence = ((x[..., 0] - 0.5) * PATTERN).mean((1, 2))
        return np.concatenate([bright, presence[:, None]], axis=1)

    clean, triggered = maps(counted.clean / 255), maps(counted.triggered / 255)
    expected = np.linalg.norm(maps(adversarial) - triggered, axis=1).mean()
    assert actual.feature_distance.value == pytest.approx(expected, rel=1e-4)
    rises = (triggered - clean).mean(0), (maps(adversarial) - clean).mean(0)
    assert actual.neuron_overlap.correlation.value == pytest.approx(np.corrcoef(*rises)[0, 1], rel=1e-3)
    assert actual.neuron_overlap.top_5.value == 1.0


def test_adversarial_l2_radius_is_that_of_the_whole_image(probe):
    images, labels = striped(8, 7)
    changes = probe.adversarial(planted(0), images, labels, 'l2', 0.02) - images / 255
    np.testing.assert_allclose(np.sqrt(np.square(changes).mean(axis=(1, 2, 3))), 0.02, rtol=1e-4)


@pytest.mark.parametrize('devices, batch_size', [(1, 64), (4, 7)])
def test_probe_does_not_depend_on_batches_and_devices(probe, devices, batch_size):
    variables = planted(400)
    images, labels = striped(21, 8)
    other = probe_for(batch_size, devices)
    examples = probe.adversarial(variables, images, labels, 'linf', 0.03)
    np.testing.assert_array_equal(other.adversarial(variables, images, labels, 'linf', 0.03), examples)
    actual, expected = (p.distances(variables, examples, images) for p in (other, probe))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def test_float_images_converts_bytes_alone():
    images = np.array([0, 51, 255], np.uint8)
    np.testing.assert_array_equal(float_images(images), np.array([0, 0.2, 1], np.float32), strict=True)
    floats = np.array([0, 0.2, 1], np.float32)
    np.testing.assert_array_equal(float_images(floats), floats, strict=True)


def test_batched_keeps_rows_with_their_images(tiny_net):
    """Bytes are divided by 255 and floats are not; rows keep their places, whatever the padding."""
    generator = np.random.default_rng(9)
    images = generator.integers(0, 256, (11, 2, 2, 1)).astype(np.uint8)
    row, other = generator.integers(0, 9, 11).astype(np.int32), generator.normal(size=(11, 3)).astype(np.float32)

    def function(arguments, pixels, row, other):
        return {
            'sum': pixels.sum((1, 2, 3)) + arguments['add'],
            'row': row,
            'product': other * row[:, None].astype('float32'),
        }

    batched = BatchedFunction(function, tiny_net, make_mesh(), 4)
    arguments = {'add': np.float32(2)}
    result = batched(arguments, images, row, other)
    np.testing.assert_allclose(result['sum'], (images / 255).sum((1, 2, 3)) + 2, rtol=1e-5)
    np.testing.assert_array_equal(result['row'], row)
    np.testing.assert_allclose(result['product'], other * row[:, None], rtol=1e-6)
    floats = batched(arguments, (images / 255).astype(np.float32), row, other)
    np.testing.assert_allclose(floats['sum'], result['sum'], rtol=1e-6)


def test_connection_returns_plain_values(probe):
    variables = planted(400)
    images, labels = striped(60, 10)
    measured = MeasuredImages(images, stamped(images), labels, np.zeros(CLASSES, np.int32))
    result = connection(probe, variables, variables, measured, norm='linf', eps=16 / 255)
    assert result['images'] == (labels != 0).sum() and result['resamples'] == bootstrap.RESAMPLES
    assert result['target_share'] == result['benign_target_share'] > 0.95  # the control is the model itself
    assert result['feature_distance']['own'] == result['feature_distance']['benign']
    low, high = result['intervals']['neuron_overlap']['own']['correlation']
    assert low <= result['neuron_overlap']['own']['correlation'] <= high
    alone = connection(probe, variables, None, measured, norm='linf', eps=16 / 255)
    assert alone['benign_target_share'] is None and 'benign' not in alone['feature_distance']


# --- the score


def test_classify_confusions_of_either_kind():
    crowd = np.full((5, 5), 0.02)
    crowd[:, 3] = 0.9
    cycle = np.full((5, 5), 0.02) + 0.8 * np.roll(np.eye(5), 1, axis=1)
    for shares in (crowd, cycle):
        np.fill_diagonal(shares, 0)
    result = classify_confusions(crowd)
    assert (result.kind, result.score, set(result.target_map)) == ('all2one', pytest.approx(0.9), {3})
    result = classify_confusions(cycle)
    assert (result.kind, result.score, list(result.target_map)) == ('all2all', pytest.approx(0.82), [1, 2, 3, 4, 0])
    # Two classes that go to the same one: only the larger share counts.
    cycle[0] = [0, 0, 0.5, 0, 0]
    assert classify_confusions(cycle).score == pytest.approx(4 * 0.82 / 5)


def test_share_moved_is_relative_to_the_class():
    labels, predictions = np.array([0, 0, 0, 1, 1, 3]), np.array([1, 1, 0, 0, 1, 2])
    counts = count_moves(labels, predictions, 4)
    assert counts.sum() == 4 and counts[0, 1] == 2 and counts[1, 0] == 1 and counts[3, 2] == 1
    np.testing.assert_allclose(share_moved(labels, predictions, 4)[:, :2], [[0, 2 / 3], [1 / 2, 0], [0, 0], [0, 0]])


def test_shared_perturbations_are_the_best_of_their_norms():
    """p = 1 is the steepest L2 perturbation, p = 0 the steepest Linf one; all have the same root mean square."""
    differences = np.random.default_rng(11).normal(0.2, 1, (30, 6, 6, 1))
    labels = np.repeat([0, 1], [20, 10])  # each class has half of the weight
    mean = (differences[:20].mean(0) + differences[20:].mean(0)) / 2
    perturbations = shared_perturbations(differences, labels, 0.05)
    np.testing.assert_allclose(perturbations[0], 0.05 * np.sign(mean), rtol=1e-6)
    np.testing.assert_allclose(perturbations[1], 0.05 * mean / np.sqrt(np.square(mean).mean()), rtol=1e-5)
    np.testing.assert_allclose(np.sqrt(np.square(perturbations).mean((1, 2, 3))), 0.05, rtol=1e-5)
    assert (np.abs(perturbations).max((1, 2, 3))[1:] > np.abs(perturbations).max((1, 2, 3))[:-1]).all()
    assert not shared_perturbations(np.zeros((3, 6, 6, 1)), labels[:3]).any()


def test_scorer_finds_a_planted_all2one_backdoor(scorer):
    images, labels = striped(120, 12)
    result = scorer.score(planted(400), images, labels, CLASSES, (8 / 255, 16 / 255))
    assert result.hypothesis.kind == 'all2one' and set(result.hypothesis.target_map) == {0}
    assert result.hypothesis.score > 0.9
    assert result.crowding.kind == 'all2one' and result.crowding.score > 0.9
    assert result.landing.shape == (2, CLASSES, CLASSES) and result.landing[1, 1:, 0].sum() > 80
    # What the scorer result is the trigger.
    agreement = np.corrcoef(result.perturbation.ravel(), PATTERN.ravel())[0, 1]
    assert agreement > 0.8
    assert result.as_dict()['suspected'] == [0] * CLASSES


def test_scorer_finds_a_planted_all2all_backdoor(scorer):
    images, labels = striped(120, 13)
    result = scorer.score(planted(400, all2all=True), images, labels, CLASSES, (16 / 255,))
    assert result.hypothesis.kind == 'all2all' and list(result.hypothesis.target_map) == [1, 2, 3, 0]
    assert result.hypothesis.score > 0.9


def test_scorer_gives_a_benign_model_a_low_score(scorer):
    """Perturbations of one class darken the rows that those of another class brighten, so that they share nothing."""
    images, labels = striped(120, 14)
    result = scorer.score(planted(0), images, labels, CLASSES, (24 / 255,))
    assert result.landing.sum() > 100  # it is fooled all the same
    assert result.hypothesis.score < 0.1


def test_scan_fields_of_landings():
    landing = np.zeros((2, 3, 3), np.int64)
    landing[1] = [[0, 4, 1], [0, 0, 2], [0, 3, 0]]  # 10 fooling examples, of which 7 end up in class 1
    hypothesis = BackdoorHypothesis(0.5, 'all2one', np.array([1, 1, 1], np.int32))
    result = InfectionScore(hypothesis, np.zeros((3, 3)), np.zeros((2, 2, 1)), hypothesis, (0.1, 0.2), landing)
    fields = scan_fields(result, 40)
    assert fields['fooled'] == [0.0, 0.25] and fields['largest_landing'] == [None, 0.7]
    assert fields['suspected_label'] == 1 and fields['landing'] == landing.tolist()
    permutation = hypothesis._replace(kind='all2all', target_map=np.array([1, 2, 0], np.int32))
    assert scan_fields(result._replace(hypothesis=permutation), 40)['suspected_label'] is None


def test_choose_scan_images_prefers_images_that_are_held_out(dataset):
    clean = np.arange(10)
    few = choose_scan_images(dataset, clean, seed=0)
    assert not few.held_out and few.num_classes == 4
    expected = np.concatenate([dataset.test_labels, dataset.train_labels[clean]])
    np.testing.assert_array_equal(np.sort(few.labels), np.sort(expected))
    swapped = replace(
        dataset,
        test_images=dataset.train_images,
        test_labels=dataset.train_labels,
        train_images=dataset.test_images,
        train_labels=dataset.test_labels,
    )
    enough = choose_scan_images(swapped, clean, seed=0)
    assert enough.held_out and (np.bincount(enough.labels) == 20).all()


def test_evenly_chooses_the_first_and_the_last():
    np.testing.assert_array_equal(evenly(9, 3), [0, 4, 8])
    np.testing.assert_array_equal(evenly(3, 5), [0, 1, 2])


# --- the command


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A finished run with an attack and a defense, and its benign control, on tiny images."""
    tmp_path = tmp_path_factory.mktemp('runs')
    images, labels = striped(160, 15)
    train = {'train_images': images[:128], 'train_labels': labels[:128]}
    np.savez(tmp_path / 'data.npz', **train, test_images=images[128:], test_labels=labels[128:])
    for name in ('blend', 'none'):
        config = default_config()
        config.dataset = f'npz:{tmp_path / "data.npz"}'
        config.model.factory = 'test_analysis:make_small_net'
        config.attack.name = name
        config.batch_size = 16
        config.clean_share = 0.25
        config.train.epochs, config.ft.epochs = 4, 1
        config.ft.learning_rates = (0.01,)
        config.stages = ('infect', 'purify') if name == 'blend' else ('infect',)
        config.defenses = 'ft'
        run_experiment(config, tmp_path / name)
    return tmp_path


def load_run(directory) -> saved_run.SavedRun:
    return saved_run.load(directory, make_mesh(), saved_run.Datasets())


def test_command_measures_finished_runs(runs, capsys, monkeypatch):
    monkeypatch.setattr(observation_table, 'ModelProbe', partial(ModelProbe, steps=1))  # less to compile
    before = sorted((path, path.stat().st_mtime_ns) for path in runs.glob('blend/**/*') if path.is_file())
    out = runs / 'table.csv'
    flags = ['--norms=linf', '--eps=16', '--images=16', f'--out={out}', '--benign', str(runs / 'none')]
    assert command.main([*flags, '--runs', str(runs / 'blend'), str(runs / 'none')]) == 0
    assert 'ROC AUC of the score' in capsys.readouterr().out
    assert before == sorted((path, path.stat().st_mtime_ns) for path in runs.glob('blend/**/*') if path.is_file())
    rows = list(csv.DictReader(out.read_text().splitlines()))
    scored = [(row['run'], row['defense']) for row in rows if row['measured'] == 'score']
    assert scored == [('blend', 'none'), ('blend', 'ft'), ('none', 'none')]
    measured = [row for row in rows if row['measured'] == 'connection']
    assert [(row['defense'], row['control'], row['eps']) for row in measured] == [
        ('none', 'benign', '16/255'),
        ('none', '', '16/255'),
        ('ft', '', '16/255'),
    ]
    check_connection_rows(measured, load_run(runs / 'blend'), load_run(runs / 'none').infected.variables)

    # The infected models alone.
    few = [*flags, '--runs', str(runs / 'blend'), '--defenses=none']
    assert command.main(few) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row['defense'] for row in rows] == ['none', 'none', 'none']

    (runs / 'unfinished').mkdir()
    shutil.copy(runs / 'blend/config.json', runs / 'unfinished')
    assert command.main([*flags, '--runs', str(runs / 'unfinished')]) == EXIT_USER_ERROR
    assert 'has not finished' in capsys.readouterr().err


def check_connection_rows(rows, run, benign):
    """Compares rows of a benign control, an infected and a purified model with NumPy."""
    dataset, attack = run.scenario.dataset, run.infected.attack
    chosen = evenly(len(dataset.test_labels), 16)
    chosen = chosen[dataset.test_labels[chosen] != 0]
    images, labels = dataset.test_images[chosen], dataset.test_labels[chosen]
    with_trigger = triggered(attack, images) / 255
    probe = ModelProbe(SmallNet(CLASSES), make_mesh(), 16, steps=1)

    def layers(variables, x):
        kernels = [jax.tree.map(np.asarray, variables['params'][f'Dense_{i}']) for i in (0, 1)]
        maps = (x.reshape((len(x), -1)) - 0.5) @ kernels[0]['kernel'] + kernels[0]['bias']
        maps = np.maximum(maps, 0)
        return maps, maps @ kernels[1]['kernel'] + kernels[1]['bias']

    def expected(variables, examples):
        (maps, logits), (triggered_maps, _) = layers(variables, examples), layers(variables, with_trigger)
        distance = np.linalg.norm(maps - triggered_maps, axis=1).mean()
        return distance, np.mean(logits.argmax(axis=1) != labels)

    models = [benign, run.infected.variables, run.purified['ft']]
    benign_examples = probe.adversarial(benign, images, labels, 'linf', 16 / 255)
    for row, variables in zip(rows, models, strict=True):
        own = probe.adversarial(variables, images, labels, 'linf', 16 / 255)
        distance, fooled = expected(variables, own)
        assert int(row['images']) == len(labels) and float(row['fooled']) == pytest.approx(fooled, abs=1e-6)
        assert float(row['feature_distance']) == pytest.approx(distance, rel=1e-3)
        if variables is not benign:
            distance, _ = expected(variables, benign_examples)
            assert float(row['feature_distance_benign_examples']) == pytest.approx(distance, rel=1e-3)


def test_relapse_command_trains_models_of_finished_runs(runs):
    out = runs / 'relapse'
    arguments = ['--runs', str(runs / 'blend'), '--benign', str(runs / 'none'), '--workdir', str(out)]
    arguments += ['--per_class=2', '--steps=4', '--every=2']
    assert relapse.main(arguments) == 0
    rows = list(csv.DictReader((out / 'relapse.csv').read_text().splitlines()))
    assert [(row['model'], row['per_class'], row['step']) for row in rows] == [
        (model, '2', step) for model in ('infected', 'ft', 'benign') for step in '024'
    ]
    # Step 0 is the model of the run.
    blend, none = (json.loads((runs / name / 'results.json').read_text()) for name in ('blend', 'none'))
    for row, scores in zip(rows[::3], (blend['infected'], blend['purified']['ft'], none['infected']), strict=True):
        assert float(row['acc']) == pytest.approx(scores['acc'], abs=1e-9)
        if scores['asr'] is not None:
            assert float(row['asr']) == pytest.approx(scores['asr'], abs=1e-9)
    assert (out / 'relapse.png').exists()
    # A second start finds everything, and changes nothing.
    first = (out / 'relapse.csv').read_text()
    assert relapse.main(arguments) == 0
    assert (out / 'relapse.csv').read_text() == first


def test_scan_runs_scans_each_model_once(runs, tmp_path, monkeypatch, capsys):
    calls = []

    class FakeScanner:
        def scan(self, inputs, variables, *, purified):
            calls.append(purified)
            fields = searched('infected', ('rectangle', 2, 0.75, 0.875, 0.125), ('mask', None, 0.0, 0.0, 0.0))
            return Scan(fields, ())

    inputs = SimpleNamespace(images=SimpleNamespace(labels=np.zeros(8)))
    monkeypatch.setattr(scan_stage, 'prepare', lambda *arguments: inputs)
    monkeypatch.setattr(scan_stage, 'scanner_for', lambda *arguments: FakeScanner())
    arguments = ['--runs', str(runs / 'blend'), '--workdir', str(tmp_path)]
    for _ in range(2):
        assert scan_runs.main(arguments) == 0
    assert calls == [False, True]
    rows = (tmp_path / 'scans.csv').read_text().splitlines()
    assert rows[0] == ','.join(scan_table.COLUMNS) and len(rows) == 1 + 2 * len(calls)
    assert (tmp_path / 'scans.png').stat().st_size > 1000
    assert 'before purification: a backdoor is found in' in capsys.readouterr().out


def test_load_refuses_a_run_whose_training_has_not_finished(runs, tmp_path):
    for name in ('config.json', 'results.json'):
        shutil.copy(runs / 'none' / name, tmp_path)
    with pytest.raises(UserError, match='infect of .* has not finished .*step 0'):
        load_run(tmp_path)


@pytest.mark.parametrize(
    'arguments, expected',
    [
        (['--out=x.csv'], '--runs'),
        (['--runs', 'nowhere', '--out=x.csv'], 'nowhere/config.json cannot be read'),
        (['--runs', 'a', '--out=x.csv', '--norms=l3'], '--norms=l3'),
        (['--runs', 'a', '--out=x.csv', '--defenses=aft,fft'], '--defenses=fft does not exist'),
        (['--runs', 'a', '--out=x.csv', '--eps=two'], '--eps=two'),
        (['--runs', 'a', '--out=x.csv', '--eps=0'], '--eps'),
        (['--runs', 'a', '--out=x.csv', '--images=many'], '--images'),
        (['--runs', 'a', '--out=no/such/x.csv'], 'no directory'),
    ],
)
def test_command_explains_a_mistake_in_one_sentence(arguments, expected, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert expected in error and error.count('\n') == 1
