"""The check of the clean images for a given model, and models that are not exported. test_purify.py has the command."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from experiment_results import results, scores

from aft_jax.defenses.tainted_images import Evidence, outlier_scores, put_aside, tainted
from aft_jax.pipeline.clean_set import Part, shift_of
from aft_jax.results import clean_set_text


class TwoNorms(nn.Module):
    """Calls its layers in another order than that of their names."""

    @nn.compact
    def __call__(self, images, train=False):
        first = nn.BatchNorm(not train, name='z')(images)
        return nn.BatchNorm(not train, name='a')(first).mean(axis=(1, 2))


def test_shift_of_is_that_of_the_layer_which_is_called_first():
    generator = np.random.default_rng(0)
    mean, new = generator.normal(size=(2, 2, 3)).astype(np.float32)
    var = generator.uniform(0.5, 2, size=(2, 3)).astype(np.float32)
    module, images = TwoNorms(), np.zeros((1, 4, 4, 3), np.float32)
    params = module.init(jax.random.key(0), images)['params']
    own, measured = (
        {'params': params, 'batch_stats': {name: {'mean': m[i], 'var': var[i]} for i, name in enumerate('az')}}
        for m in (mean, new)
    )
    expected = np.mean(np.abs(new[1] - mean[1]) / np.sqrt(var[1] + 1e-5))
    assert shift_of(module, own, measured, (4, 4, 3)) == pytest.approx(expected, rel=1e-5)
    plain = nn.Dense(3)
    assert shift_of(plain, plain.init(jax.random.key(0), images), {}, (4, 4, 3)) == 0.0


def test_weak_classes_have_less_than_half_of_the_accuracy():
    labels = np.array([0] * 6 + [1] * 6 + [2] * 4)
    predictions = np.array([0] * 6 + [1] * 2 + [0] * 4 + [0] * 4)
    part = Part('training', predictions, labels)
    # Class 2 has too few images.
    assert part.accuracy == 0.5 and part.weak_classes(3) == []
    predictions[7] = 0
    assert Part('training', predictions, labels).weak_classes(3) == [(1, 1, 6)]


def test_withhold_names_models_that_lose_too_much():
    measured = results(scores(0.95), given=True, aft=scores(0.86), ft=scores(0.92))
    measured.withhold(0.05)
    assert clean_set_text.withheld_lines(measured) == [
        'aft is not exported, since it loses 9.0 points of accuracy on held-out clean images, and 5 are allowed '
        '(safety.largest_loss); --config.safety.export_anyway=True exports it.'
    ]
    again = type(measured).from_json(json.loads(json.dumps(measured.to_json())))
    assert again.withheld == measured.withheld
    measured.withhold(0.1)
    assert measured.withheld == {}


def test_outlier_scores_are_distances_to_the_median_of_the_label():
    generator = np.random.default_rng(3)
    features, labels = generator.normal(size=(9, 4)), np.array([0, 1, 1, 0, 1, 0, 0, 1, 0])
    expected = [
        np.linalg.norm((x - np.median(features[labels == y], axis=0)) / (features.std(axis=0) + 1e-6))
        for x, y in zip(features, labels, strict=True)
    ]
    np.testing.assert_allclose(outlier_scores(features, labels), expected)


def test_tainted_selects_labels_with_several_suspicious_outliers():
    labels = np.repeat(np.arange(3), 20)
    infected = np.full((60, 3), -6.0)
    infected[np.arange(60), labels] = -0.01
    reference = infected.copy()
    outliers = np.zeros(60)

    def change(index, margin=5.0, outlier=True):
        reference[index] = -0.02
        reference[index, labels[index]] = -0.01 - margin
        outliers[index] = outlier

    for index in (0, 3, 5, 7):
        change(index)
    change(9, margin=1.9)
    change(11, outlier=False)
    # One of a label may be chance. If the infected model does not predict the label, it is only wrong.
    for index in (20, 40, 41, 42):
        change(index)
    infected[40] = infected[41] = [-0.01, -6, -6]
    np.testing.assert_array_equal(tainted(Evidence(put_aside(outliers), infected, reference), labels), [0, 3, 5, 7])
    # Now label 1 has three: its share is not three times the mean of the others.
    change(21)
    change(22)
    np.testing.assert_array_equal(tainted(Evidence(put_aside(outliers), infected, reference), labels), [])
