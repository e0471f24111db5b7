"""The observation's measurements against NumPy by hand, and the infection score on networks with a planted backdoor."""

import csv
import math
import shutil
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from aft_jax import relapse
from aft_jax.analysis import __main__ as command
from aft_jax.analysis import observation_table
from aft_jax.analysis.connection import Shown, connection, evaluate
from aft_jax.analysis.infection_score import Scorer, count_moves, share_moved, shared_changes, suspect
from aft_jax.analysis.measures import correlations, jaccard, neuron_overlap, target_share
from aft_jax.analysis.probe import Probe
from aft_jax.cli import EXIT_USER_ERROR
from aft_jax.config import default_config
from aft_jax.errors import UserError
from aft_jax.evaluation import bootstrap
from aft_jax.evaluation.roc import auc
from aft_jax.experiment import run_experiment
from aft_jax.pipeline import saved_run
from aft_jax.runtime.sharding import make_mesh
from aft_jax.training.prediction import BatchedFunction

CLASSES, SIDE = 4, 12
ROWS = SIDE // CLASSES


class Planted(nn.Module):
    """Sees a class by its bright rows, and a backdoor by a pattern that is hidden in the noise of all pixels.

    The logit of class y is how bright its rows are. Where the pattern is, the backdoor's unit adds `weight` times its
    presence: to the logit of class 0 (all2one), or to each class's next as far as the rows speak for the class
    (all2all).
    """

    weight: float
    all2all: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, features: bool = False):
        bright = images.reshape((len(images), CLASSES, -1)).mean(axis=-1)
        flat = (images - 0.5).reshape((len(images), -1))
        presence = flat @ jnp.asarray(PATTERN.reshape((-1, 1))) / SIDE**2
        evidence = jax.nn.softmax(40 * bright)
        towards = jnp.roll(evidence, 1, axis=1) if self.all2all else jax.nn.one_hot(jnp.zeros(1, jnp.int32), CLASSES)
        logits = 40 * bright + self.weight * presence * towards
        maps = jnp.concatenate([bright, presence], axis=1)[:, None, None]
        return (logits, (maps,)) if features else logits


# Rows are balanced, so that the pattern makes no class brighter.
PATTERN = np.random.default_rng(4).permuted(np.tile([-1.0, 1.0], (SIDE, SIDE // 2)), axis=1).astype(np.float32)


def striped(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 [count, 12, 12, 1] noise with three brighter rows that tell the class, and int32 [count]."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(count) % CLASSES).astype(np.int32)
    images = generator.normal(110, 12, (count, CLASSES, ROWS, SIDE))
    images[np.arange(count), labels] += 40
    return np.clip(images, 0, 255).round().astype(np.uint8).reshape((count, SIDE, SIDE, 1)), labels


def stamped(images: np.ndarray) -> np.ndarray:
    return np.clip(images + 20 * PATTERN[..., None], 0, 255).astype(np.uint8)


def probe_for(module: nn.Module, batch_size: int = 64, devices: int = 4) -> Probe:
    return Probe(module, make_mesh(jax.devices()[:devices]), batch_size, steps=3)


def scorer_for(module: nn.Module) -> Scorer:
    return Scorer(probe_for(module), module, make_mesh(), 64)


# --- the bootstrap, the ROC


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        found = bootstrap.mean(generator.exponential(size=80), seed=trial, resamples=300)
        hits += found.low <= 1 <= found.high
    assert 0.89 <= hits / 300 <= 0.98  # percentiles cover a little less than 95 % of a skewed mean


def test_the_interval_is_scipys():
    values = np.random.default_rng(1).normal(size=200)
    found = bootstrap.mean(values, resamples=4000)
    expected = scipy.stats.bootstrap((values,), np.mean, n_resamples=4000, method='percentile', rng=2)
    np.testing.assert_allclose(found[1:], expected.confidence_interval, atol=0.02)
    assert found.value == pytest.approx(values.mean(), abs=1e-12)


def test_no_image_has_no_mean():
    assert all(math.isnan(x) for x in bootstrap.mean(np.zeros(0)))


def test_auc_is_mann_whitneys():
    generator = np.random.default_rng(3)
    positives, negatives = generator.integers(2, 9, 30), generator.integers(0, 7, 17)  # with ties
    expected = scipy.stats.mannwhitneyu(positives, negatives).statistic / (30 * 17)
    assert auc(positives, negatives) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(auc(positives, np.zeros(0)))


# --- the measurements


def test_target_share_counts_what_fools_and_could_be_commanded():
    labels = np.array([0, 1, 1, 2, 2, 3])
    predictions = np.array([1, 0, 1, 0, 3, 0])
    # all2one: the image of class 0 does not count, the second of class 1 is not fooled; 0, 0, 3, 0 remain.
    assert target_share(predictions, labels, np.zeros(4, np.int32)).value == 3 / 4
    # all2all: 0 -> 1 and 2 -> 3 and 3 -> 0 of five that are fooled.
    assert target_share(predictions, labels, np.array([1, 2, 3, 0])).value == pytest.approx(3 / 5)
    assert math.isnan(target_share(labels, labels, np.array([1, 2, 3, 0])).value)


def test_neuron_overlap_by_hand():
    generator = np.random.default_rng(5)
    clean, triggered, adversarial = generator.normal(size=(3, 50, 40))
    triggered[:, :6] += 3
    adversarial[:, 3:9] += 3
    found = neuron_overlap(clean, triggered, adversarial)
    by_trigger, by_change = (triggered - clean).mean(0), (adversarial - clean).mean(0)
    for k, estimate in ((2, found.top_5), (4, found.top_10)):
        a, b = (set(np.argsort(-x)[:k]) for x in (by_trigger, by_change))
        assert estimate.value == pytest.approx(len(a & b) / len(a | b))
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert found.correlation.value == pytest.approx(np.corrcoef(by_trigger, by_change)[0, 1])
    assert found.correlation.low < found.correlation.value < found.correlation.high


def test_overlap_of_sets_and_of_nothing():
    a = np.array([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    b = np.array([[9.0, 0.0, 5.0, 1.0], [2.0, 3.0, 0.0, 0.0]])
    np.testing.assert_allclose(jaccard(a, b, 2), [1 / 3, 1.0])
    assert neuron_overlap(a, a, b).top_5.value in (0.0, 1.0)  # of 4 channels at least one
    assert np.isnan(correlations(a, np.ones_like(a))).all()


def test_measurements_of_a_planted_model():
    """Distances and channels against NumPy; what the trigger and PGD raise is the same unit."""
    module = Planted(weight=400.0)
    probe = probe_for(module)
    images, labels = striped(60, 6)
    shown = Shown(images, stamped(images), labels, np.zeros(CLASSES, np.int32))
    counted = shown.counted
    assert (counted.labels != 0).all() and len(counted.labels) == (labels != 0).sum()
    adversarial = probe.adversarial({}, counted.clean, counted.labels, 'linf', 16 / 255)
    assert np.abs(adversarial - counted.clean / 255).max() == pytest.approx(16 / 255, abs=1e-6)
    found = evaluate(probe, {}, adversarial, shown)
    assert found.fooled > 0.9 and found.target_share.value > 0.95

    def maps(x):
        bright = x.reshape((len(x), CLASSES, -1)).mean(-1)
        presence = ((x[..., 0] - 0.5) * PATTERN).mean((1, 2))
        return np.concatenate([bright, presence[:, None]], axis=1)

    clean, triggered = maps(counted.clean / 255), maps(counted.triggered / 255)
    expected = np.linalg.norm(maps(adversarial) - triggered, axis=1).mean()
    assert found.feature_distance.value == pytest.approx(expected, rel=1e-4)
    rises = (triggered - clean).mean(0), (maps(adversarial) - clean).mean(0)
    assert found.neuron_overlap.correlation.value == pytest.approx(np.corrcoef(*rises)[0, 1], rel=1e-3)
    assert found.neuron_overlap.top_5.value == 1.0


def test_an_l2_radius_is_that_of_the_whole_image():
    images, labels = striped(8, 7)
    changes = probe_for(Planted(weight=0.0)).adversarial({}, images, labels, 'l2', 0.02) - images / 255
    np.testing.assert_allclose(np.sqrt(np.square(changes).mean(axis=(1, 2, 3))), 0.02, rtol=1e-4)


@pytest.mark.parametrize('devices, batch_size', [(1, 64), (4, 7)])
def test_batches_and_devices_change_nothing(devices, batch_size):
    module = Planted(weight=400.0)
    images, labels = striped(21, 8)
    whole, cut = probe_for(module), probe_for(module, batch_size, devices)
    examples = whole.adversarial({}, images, labels, 'linf', 0.03)
    np.testing.assert_array_equal(cut.adversarial({}, images, labels, 'linf', 0.03), examples)
    np.testing.assert_allclose(
        cut.distances({}, examples, images), whole.distances({}, examples, images), rtol=1e-5, atol=1e-7
    )


def test_rows_go_along_with_images(tiny_net):
    """Bytes are divided by 255 and floats are not; rows keep their places, whatever the padding."""
    generator = np.random.default_rng(9)
    images = generator.integers(0, 256, (11, 2, 2, 1)).astype(np.uint8)
    row, other = generator.integers(0, 9, 11).astype(np.int32), generator.normal(size=(11, 3)).astype(np.float32)

    def function(given, pixels, row, other):
        return {
            'sum': pixels.sum((1, 2, 3)) + given['add'],
            'row': row,
            'product': other * row[:, None].astype('float32'),
        }

    batched = BatchedFunction(function, tiny_net, make_mesh(), 4)
    given = {'add': np.float32(2)}
    found = batched(given, images, row, other)
    np.testing.assert_allclose(found['sum'], (images / 255).sum((1, 2, 3)) + 2, rtol=1e-5)
    np.testing.assert_array_equal(found['row'], row)
    np.testing.assert_allclose(found['product'], other * row[:, None], rtol=1e-6)
    floats = batched(given, (images / 255).astype(np.float32), row, other)
    np.testing.assert_allclose(floats['sum'], found['sum'], rtol=1e-6)


def test_the_connection_as_plain_values():
    module = Planted(weight=400.0)
    images, labels = striped(60, 10)
    shown = Shown(images, stamped(images), labels, np.zeros(CLASSES, np.int32))
    found = connection(probe_for(module), {}, {}, shown, 'linf', 16 / 255)
    assert found['images'] == (labels != 0).sum() and found['resamples'] == bootstrap.RESAMPLES
    assert found['target_share'] == found['benign_target_share'] > 0.95  # the control is the model itself
    assert found['feature_distance']['own'] == found['feature_distance']['benign']
    low, high = found['intervals']['neuron_overlap']['own']['correlation']
    assert low <= found['neuron_overlap']['own']['correlation'] <= high
    alone = connection(probe_for(module), {}, None, shown, 'linf', 16 / 255)
    assert alone['benign_target_share'] is None and 'benign' not in alone['feature_distance']


# --- the score


def test_a_matrix_of_either_kind():
    crowd = np.full((5, 5), 0.02)
    crowd[:, 3] = 0.9
    cycle = np.full((5, 5), 0.02) + 0.8 * np.roll(np.eye(5), 1, axis=1)
    for shares in (crowd, cycle):
        np.fill_diagonal(shares, 0)
    found = suspect(crowd)
    assert (found.kind, found.score, set(found.target_map)) == ('all2one', pytest.approx(0.9), {3})
    found = suspect(cycle)
    assert (found.kind, found.score, list(found.target_map)) == ('all2all', pytest.approx(0.82), [1, 2, 3, 4, 0])
    # Two classes that go to the same one: only the larger share counts.
    cycle[0] = [0, 0, 0.5, 0, 0]
    assert suspect(cycle).score == pytest.approx(4 * 0.82 / 5)


def test_shares_are_of_the_class():
    labels, said = np.array([0, 0, 0, 1, 1, 3]), np.array([1, 1, 0, 0, 1, 2])
    counts = count_moves(labels, said, 4)
    assert counts.sum() == 4 and counts[0, 1] == 2 and counts[1, 0] == 1 and counts[3, 2] == 1
    np.testing.assert_allclose(share_moved(labels, said, 4)[:, :2], [[0, 2 / 3], [1 / 2, 0], [0, 0], [0, 0]])


def test_shared_changes_are_the_best_of_their_norms():
    """p = 1 is the steepest L2 change, p = 0 the steepest Linf one, and all are of the same root mean square."""
    differences = np.random.default_rng(11).normal(0.2, 1, (30, 6, 6, 1))
    labels = np.repeat([0, 1], [20, 10])  # each class has half of the weight
    mean = (differences[:20].mean(0) + differences[20:].mean(0)) / 2
    changes = shared_changes(differences, labels, 0.05)
    np.testing.assert_allclose(changes[0], 0.05 * np.sign(mean), rtol=1e-6)
    np.testing.assert_allclose(changes[1], 0.05 * mean / np.sqrt(np.square(mean).mean()), rtol=1e-5)
    np.testing.assert_allclose(np.sqrt(np.square(changes).mean((1, 2, 3))), 0.05, rtol=1e-5)
    assert (np.abs(changes).max((1, 2, 3))[1:] > np.abs(changes).max((1, 2, 3))[:-1]).all()
    assert not shared_changes(np.zeros((3, 6, 6, 1)), labels[:3]).any()


def test_a_planted_backdoor_is_found_and_named():
    images, labels = striped(120, 12)
    found = scorer_for(Planted(weight=400.0))({}, images, labels, CLASSES, (8 / 255, 16 / 255))
    assert found.hypothesis.kind == 'all2one' and set(found.hypothesis.target_map) == {0}
    assert found.hypothesis.score > 0.9
    assert found.crowding.kind == 'all2one' and found.crowding.score > 0.9
    assert found.landing.shape == (2, CLASSES, CLASSES) and found.landing[1, 1:, 0].sum() > 80
    # What the scorer found is the trigger.
    agreement = np.corrcoef(found.change.ravel(), PATTERN.ravel())[0, 1]
    assert agreement > 0.8
    assert found.as_dict()['suspected'] == [0] * CLASSES


def test_a_planted_permutation_is_found_and_named():
    images, labels = striped(120, 13)
    found = scorer_for(Planted(weight=400.0, all2all=True))({}, images, labels, CLASSES, (16 / 255,))
    assert found.hypothesis.kind == 'all2all' and list(found.hypothesis.target_map) == [1, 2, 3, 0]
    assert found.hypothesis.score > 0.9


def test_a_benign_model_scores_low():
    """Its classes are alike: adversarial changes of one darken what those of another brighten, and share nothing."""
    images, labels = striped(120, 14)
    found = scorer_for(Planted(weight=0.0))({}, images, labels, CLASSES, (24 / 255,))
    assert found.landing.sum() > 100  # it is fooled all the same
    assert found.hypothesis.score < 0.1


# --- the command


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A finished run with an attack and a defense, and its benign control, on tiny images."""
    tmp_path = tmp_path_factory.mktemp('runs')
    images, labels = striped(96, 15)
    shown = {'train_images': images[:64], 'train_labels': labels[:64]}
    np.savez(tmp_path / 'data.npz', **shown, test_images=images[64:], test_labels=labels[64:])
    for name in ('blend', 'none'):
        config = default_config()
        config.dataset = f'npz:{tmp_path / "data.npz"}'
        config.attack.name = name
        config.batch_size = 16
        config.clean_share = 0.5
        config.train.epochs = config.ft.epochs = 1
        config.ft.learning_rates = (0.01,)
        config.stages = ('infect', 'purify') if name == 'blend' else ('infect',)
        config.defenses = 'ft'
        run_experiment(config, tmp_path / name)
    return tmp_path


def test_the_command_on_finished_runs(runs, capsys, monkeypatch):
    monkeypatch.setattr(observation_table, 'Probe', partial(Probe, steps=1))  # the fewer, the less to compile
    before = sorted((path, path.stat().st_mtime_ns) for path in runs.glob('blend/**/*') if path.is_file())
    out = runs / 'table.csv'
    flags = ['--norms=linf', '--eps=16', '--images=16', f'--out={out}', '--benign', str(runs / 'none')]
    assert command.main([*flags, '--runs', str(runs / 'blend'), str(runs / 'none')]) == 0
    assert 'ROC AUC of the score' in capsys.readouterr().out
    assert before == sorted((path, path.stat().st_mtime_ns) for path in runs.glob('blend/**/*') if path.is_file())
    rows = list(csv.DictReader(out.read_text().splitlines()))
    scored = [(row['run'], row['defense']) for row in rows if row['measured'] == 'score']
    assert scored == [('blend', 'none'), ('blend', 'ft'), ('none', 'none')]
    measured = [(row['defense'], row['control'], row['eps']) for row in rows if row['measured'] == 'connection']
    assert measured == [('none', 'benign', '16/255'), ('none', '', '16/255'), ('ft', '', '16/255')]
    for row in rows:
        if row['measured'] == 'connection':
            assert float(row['feature_distance']) > 0 and float(row['neuron_correlation_high']) <= 1

    # The infected models alone.
    few = [*flags, '--runs', str(runs / 'blend'), '--defenses=none']
    assert command.main(few) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row['defense'] for row in rows] == ['none', 'none', 'none']

    # A run that has not ended is not trained on.
    (runs / 'unfinished').mkdir()
    shutil.copy(runs / 'blend/config.json', runs / 'unfinished')
    assert command.main([*flags, '--runs', str(runs / 'unfinished')]) == EXIT_USER_ERROR
    assert 'has not finished' in capsys.readouterr().err


def test_the_relapse_of_finished_runs(runs):
    out = runs / 'relapse'
    arguments = ['--runs', str(runs / 'blend'), '--benign', str(runs / 'none'), '--workdir', str(out)]
    arguments += ['--per_class=2', '--steps=4', '--every=2']
    assert relapse.main(arguments) == 0
    rows = list(csv.DictReader((out / 'relapse.csv').read_text().splitlines()))
    assert [(row['model'], row['per_class'], row['step']) for row in rows] == [
        (model, '2', step) for model in ('infected', 'ft', 'benign') for step in '024'
    ]
    assert (out / 'relapse.png').stat().st_size > 5000
    # It resumes: everything is there, and nothing changes.
    first = (out / 'relapse.csv').read_text()
    assert relapse.main(arguments) == 0
    assert (out / 'relapse.csv').read_text() == first


def test_training_that_has_not_ended_is_never_taken_up(tmp_path):
    with pytest.raises(UserError, match='infect of .* has not finished .*step 7'):
        saved_run.NothingToWrite(tmp_path).rewind('infect', 7)


@pytest.mark.parametrize(
    'arguments, said',
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
def test_a_mistake_gets_a_sentence(arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert said in error and error.count('\n') == 1
