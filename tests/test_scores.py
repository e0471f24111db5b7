"""Scores against values computed by hand; the predictor against the model itself."""

import jax
import numpy as np
import pytest

from aft_jax.evaluation.scores import Scores, defense_effectiveness, score
from aft_jax.runtime.sharding import make_mesh
from aft_jax.training.prediction import Predictor

LABELS = np.array([0, 0, 1, 1, 1, 2, 2, 2], np.int32)
CLEAN = np.array([0, 1, 1, 1, 2, 2, 2, 2], np.int32)  # right, wrong, right, right, wrong, right, right, right
NAN = float('nan')


def scores(acc, asr):
    nothing = np.zeros(0)
    return Scores(acc, asr, 0.0, nothing, nothing, nothing)


def test_score_leaves_out_the_target_class_of_all2one():
    triggered = np.array([1, 0, 0, 0, 1, 0, 2, 1], np.int32)
    actual = score(CLEAN, triggered, LABELS, np.zeros(3, np.int32), 3)
    # Six images of classes 1 and 2 count: three are classified as the target 0, two as their own label.
    assert actual.acc == 6 / 8
    assert actual.asr == 3 / 6
    assert actual.ra == 2 / 6
    np.testing.assert_array_equal(actual.acc_per_class, [1 / 2, 2 / 3, 1])
    np.testing.assert_array_equal(actual.asr_per_class, [NAN, 2 / 3, 1 / 3])
    np.testing.assert_array_equal(actual.ra_per_class, [NAN, 1 / 3, 1 / 3])


def test_score_counts_every_image_of_all2all():
    triggered = np.array([1, 0, 2, 2, 0, 0, 2, 2], np.int32)
    actual = score(CLEAN, triggered, LABELS, np.array([1, 2, 0], np.int32), 3)
    assert actual.asr == 4 / 8
    assert actual.ra == 3 / 8
    np.testing.assert_array_equal(actual.asr_per_class, [1 / 2, 2 / 3, 1 / 3])
    np.testing.assert_array_equal(actual.ra_per_class, [1 / 2, 0, 2 / 3])


def test_score_without_an_attack_is_accuracy_alone():
    actual = score(CLEAN, None, LABELS, None, 3)
    assert actual.acc == 6 / 8
    np.testing.assert_array_equal([actual.asr, actual.ra], [NAN, NAN])
    np.testing.assert_array_equal(actual.acc_per_class, [1 / 2, 2 / 3, 1])
    np.testing.assert_array_equal([actual.asr_per_class, actual.ra_per_class], np.full((2, 3), NAN))


def test_score_counts_true_labels_of_every_image_in_cross_mode():
    cross_images = np.array([0, 0, 1, 0, 0, 2, 0, 0], np.int32)
    actual = score(CLEAN, CLEAN, LABELS, np.zeros(3, np.int32), 3, cross_images)
    assert actual.cross_acc == 4 / 8
    assert np.isnan(score(CLEAN, CLEAN, LABELS, np.zeros(3, np.int32), 3).cross_acc)


def test_score_of_a_class_without_images_is_nan():
    actual = score(CLEAN, CLEAN, LABELS, np.zeros(4, np.int32), 4)
    np.testing.assert_array_equal(actual.acc_per_class, [1 / 2, 2 / 3, 1, NAN])


@pytest.mark.parametrize(
    ('before', 'after', 'expected'),
    [
        ((0.9, 1.0), (0.9, 0.0), 1.0),  # erased at no cost
        ((0.9, 1.0), (0.8, 0.2), 0.85),  # (0.8 - 0.1 + 1) / 2
        ((0.9, 0.5), (0.95, 0.7), 0.5),  # a gain in ACC and a rise of ASR do not count
        ((0.9, 0.5), (0.4, 0.5), 0.25),
    ],
)
def test_defense_effectiveness(before, after, expected):
    assert defense_effectiveness(scores(*before), scores(*after)) == pytest.approx(expected, abs=1e-12)


def test_defense_effectiveness_without_an_attack_is_nan():
    assert np.isnan(defense_effectiveness(scores(0.9, NAN), scores(0.8, NAN)))


@pytest.mark.parametrize('devices', [1, 4])
@pytest.mark.parametrize('batch_size', [6, 8, 50])  # 22 images: the last batch is never whole
def test_predictor_equals_the_model_itself(dataset, tiny_net, tiny_variables, devices, batch_size):
    images = dataset.test_images[:22]
    logits = np.asarray(tiny_net.apply(tiny_variables, images.astype(np.float32) / 255))
    expected = logits.argmax(axis=1)
    assert len(set(expected)) > 1
    assert np.diff(np.sort(logits, axis=1)[:, -2:]).min() > 1e-5  # no ties that rounding could change
    predict = Predictor(tiny_net, make_mesh(jax.devices()[:devices]), batch_size)
    actual = predict(tiny_variables, images)
    assert actual.dtype == np.int32 and isinstance(actual, np.ndarray)
    np.testing.assert_array_equal(actual, expected)
