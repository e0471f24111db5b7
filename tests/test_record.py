"""Results as a value: conversion from and to results.json, and what a later start keeps."""

import dataclasses
import json
import math

import numpy as np
import pytest
from experiment_results import results, scores

from aft_jax.evaluation.scores import PoisonDetection, Scores
from aft_jax.results import record
from aft_jax.results.drawn_trigger import DrawnTrigger
from aft_jax.results.record import ModelScores, PurifiedScores, Results

PER_CLASS = {'acc': [0.5, 1.0], 'asr': [None, 0.9], 'ra': [None, 0.1]}
WHOLE = scores(0.75, 0.9, cross_acc=None, per_class=PER_CLASS)
SCAN = {'score': 0.5}


def measured(acc, asr, cross_acc=math.nan):
    nothing = np.array([math.nan, asr])
    return Scores(acc, asr, 1 - asr, np.array([0.5, 1.0]), nothing, 1 - nothing, cross_acc)


def test_results_from_json_to_json_is_the_same():
    detection = {'clean_share': 0.0, 'poisoned_shares': [0.1, 0.02], 'aucs': [0.7, None]}
    connection = {'fooled': 0.5, 'purified': {}}
    for expected in (
        results(WHOLE, connection=connection, aft=WHOLE | {'der': 0.5}, pbe=WHOLE | {'der': 0.6} | detection),
        dataclasses.replace(results(WHOLE), trigger=DrawnTrigger(7, 'local', 'local bar')),
        results(WHOLE | {'scan': SCAN}, given=True, aft=WHOLE | {'der': None, 'scan': SCAN}),
    ):
        fields = json.loads(json.dumps(expected.to_json()))
        assert json.dumps(Results.from_json(fields).to_json()) == json.dumps(expected.to_json())
    given = fields['suspect']
    assert fields['infected'] == {} and 'seconds' not in given and given['scan'] == SCAN and given['acc'] == 0.75
    purified = results(WHOLE, pbe=WHOLE | {'der': 0.6} | detection).to_json()['purified']['pbe']
    assert purified == WHOLE | {'der': 0.6} | detection


@pytest.mark.parametrize(
    'kind, first, model',
    [
        ('infected', 'infected', results(WHOLE)),
        ('benign', 'benign', results(WHOLE, attack='none')),
        ('given', 'suspect', results(WHOLE, given=True)),
    ],
)
def test_kind_of_the_first_model(kind, first, model):
    assert model.kind == kind and model.first_model == first and list(model.models) == [first]


@pytest.mark.parametrize('content', ['{}', '[]', '{"infected"', '{"infected": 3}'])
def test_read_refuses_a_damaged_file(tmp_path, content):
    (tmp_path / 'results.json').write_text(content)
    with pytest.raises(ValueError):
        record.read(tmp_path / 'results.json')


def test_model_scores_of_has_none_for_nan():
    model = ModelScores.of(measured(0.75, 0.5), seconds=1.23456)
    assert model == ModelScores(0.75, 0.5, 0.5, None, {'acc': [0.5, 1.0], 'asr': [None, 0.5], 'ra': [None, 0.5]}, 1.235)


def test_purified_scores_compared_has_the_der_of_the_definition():
    purified = PurifiedScores.compared(measured(0.9, 1.0), measured(0.8, 0.1), 2.0, scan=SCAN)
    assert purified.der == pytest.approx((0.9 - 0.1 + 1) / 2) and purified.scan == SCAN
    assert PurifiedScores.compared(measured(0.9, math.nan), measured(0.8, math.nan), 2.0).der is None
    detection = PoisonDetection((0.1,), (math.nan,))
    purified = PurifiedScores.compared(measured(0.9, 1.0), measured(0.8, 0.1), 2.0, detection=detection)
    assert purified.to_json()['aucs'] == [None]


def test_later_start_keeps_seconds_defenses_and_observation():
    earlier = results(WHOLE, ft=WHOLE | {'seconds': 7.0}, aft=WHOLE | {'seconds': 8.0})
    earlier.add_observation({'fooled': 0.1, 'purified': {'ft': {'fooled': 0.2}, 'aft': {'fooled': 0.3}}})
    later = results(WHOLE)
    later.keep_earlier(earlier)
    later.add_purified('aft', PurifiedScores(0.6, seconds=0.1))
    later.add_purified('nad', PurifiedScores(0.7, seconds=3.0))
    assert [(name, row.acc, row.seconds) for name, row in later.purified.items()] == [
        ('ft', 0.75, 7.0),
        ('aft', 0.6, 8.0),
        ('nad', 0.7, 3.0),
    ]
    later.add_observation({'fooled': 0.4, 'purified': {'aft': {'fooled': 0.5}}})
    assert later.observation == {'fooled': 0.4, 'purified': {'ft': {'fooled': 0.2}, 'aft': {'fooled': 0.5}}}
    assert list(earlier.purified) == ['ft', 'aft'] and earlier.purified['aft'].seconds == 8.0
