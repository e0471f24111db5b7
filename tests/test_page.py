"""report/index.html: what it shows of each kind of run, that it needs nothing beside it, and what its figures tell."""

import json
import re
from xml.etree import ElementTree

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from page_reader import BROWSER, Reader, look

from aft_jax import attacks
from aft_jax.analysis import observe as observe_module
from aft_jax.analysis.observation import ModelOutputs, Observation
from aft_jax.attacks.poison import NO_INDICES, Poisoned, write_manifest
from aft_jax.evaluation.bootstrap import NOTHING, Estimate
from aft_jax.pipeline.scenario import InfectedModel, Scenario
from aft_jax.pipeline.stages import evaluator_for
from aft_jax.report import observation_figures, page, purification_curves, table_page, verdict
from aft_jax.results import aggregate

NAMES = ('zero', '<one> & $two$', 'three')


def scores(acc, asr, **more):
    return {'acc': acc, 'asr': asr, 'ra': None if asr is None else 1 - asr, 'seconds': 1.5} | more


def results(before, attack='blend', **purified):
    return {
        'dataset': 'tiny',
        'model': 'net',
        'attack': attack,
        'label_mode': 'all2one',
        'seed': 3,
        'clean_share': 0.05,
        'infected': before,
        'purified': purified,
        'environment': {'jax': '0', 'backend': 'cpu', 'devices': 1, 'processes': 1},
    }


def connected(share):
    overlap = {'top_5': 1.0, 'top_10': 0.5, 'correlation': None}
    values = {'target_share': share, 'feature_distance': {'own': 2.5}, 'neuron_overlap': {'own': overlap}}
    intervals = {'target_share': [0.7, 0.9], 'feature_distance': {'own': [2.0, 3.0]}, 'neuron_overlap': {}}
    return values | {'fooled': 0.25, 'intervals': intervals}


def observation(triggered=True, features=True):
    generator = np.random.default_rng(5)
    kinds = ('clean', 'triggered', 'adversarial') if triggered else ('clean', 'adversarial')
    labels = np.repeat(np.array([1, 2], np.int32), 6)
    models = ('infected', 'ft', 'aft') if triggered else ('suspect', 'aft')

    def seen():
        said = {kind: generator.integers(0, 3, 12, dtype=np.int32) for kind in kinds}
        return ModelOutputs(said, {k: generator.random((12, 5), np.float32) for k in kinds} if features else {})

    return Observation(
        labels=labels,
        target_map=np.zeros(3, np.int32) if triggered else None,
        eps=8 / 255,
        images={kind: generator.integers(0, 256, (12, 6, 6, 1), np.uint8) for kind in kinds},
        outputs={name: seen() for name in models},
        transferred={name: labels for name in models},
        swept_eps=(2 / 255, 4 / 255),
        swept={name: [NOTHING, Estimate(0.5, 0.25, 0.75)] for name in ('infected', 'aft')} if triggered else {},
        connection=connected(0.8) if triggered else None,
    )


def write(directory, outcome, seen):
    page.write_page(directory / 'report', outcome, seen, NAMES)
    return (directory / 'report' / 'index.html').read_text()


def watched():
    """What a evaluator writes who looks on: FT tried two learning rates and took the second; AFT dips; ANP is no model."""
    stages = {
        'infect': [(0.2, 0.1), (0.95, 0.99)],
        'purify/ft/0.01': [(0.95, 0.99), (0.96, 0.985)],
        'purify/ft/0.03': [(0.95, 0.99), (0.945, 0.985), (0.94, 0.98)],
        'purify/aft': [(0.95, 0.99), (0.9, 0.25), (0.94, 0.01)],
        'purify/aft2': [(0.94, 0.01)],
    }
    for stage, measured in stages.items():
        yield {'step': 1, 'stage': stage, 'loss': 1.0}
        for i, (acc, asr) in enumerate(measured):
            yield {'step': i, 'stage': stage, 'epoch': 2.5 * i, 'test_acc': acc, 'test_asr': asr}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The page of an infected model that two defenses purified, with its directory."""
    directory = tmp_path_factory.mktemp('run')
    empty = np.zeros((0, 6, 6, 1), np.uint8)
    write_manifest(directory / 'poison.npz', None, Poisoned(empty, NO_INDICES, np.arange(7), NO_INDICES), np.arange(5))
    (directory / 'config.json').write_text(json.dumps({'seed': 3, 'aft': {'eps': 0.125, 'preset': ''}}))
    (directory / 'metrics.jsonl').write_text(
        ''.join(json.dumps(line) + '\n' for line in watched()) + '{"step": 9, "sta'
    )
    outcome = results(scores(0.95, 0.99), ft=scores(0.94, 0.98, der=0.5), aft=scores(0.94, 0.01, der=0.985))
    outcome['connection'] = connected(0.8) | {'purified': {'aft': connected(None)}}
    return directory, write(directory, outcome, observation())


def test_the_page_stands_by_itself(whole):
    directory, text = whole
    read = Reader(text)
    read.check_stands_by_itself()
    assert read.sections == ['purification', 'trigger', 'examples', 'landing', 'inside', 'connection', 'made']
    for name in (
        *('landing', 'target_share', 'purification_acc', 'purification_asr'),
        *(f'{f}_{m}' for f in ('activations', 'features') for m in ('infected', 'aft')),
    ):
        assert (directory / 'report' / f'{name}.png').read_bytes()[:4] == b'\x89PNG'
        assert ElementTree.parse(directory / 'report' / f'{name}.svg').getroot().tag.endswith('svg')


def test_everything_seen_is_told(whole):
    read = Reader(whole[1])
    assert len(read.all('img')) == 3 * 2 + 3 * 2 and len(read.all('svg')) == 8
    for attributes in read.all('svg'):
        assert attributes['role'] == 'img' and re.search(r'\d', attributes['aria-label'])
    alts = ' '.join(attributes['alt'] for attributes in read.all('img'))
    assert 'Adversarial image of class <one> & $two$: infected says <one> & $two$, aft says <one> & $two$.' in alts


def test_the_curves_are_those_of_the_models_of_the_table(whole, tmp_path):
    acc, asr = (
        next(a['aria-label'] for a in Reader(whole[1]).all('svg') if a['aria-label'].startswith(score)).replace(
            '\xa0', ' '
        )
        for score in ('ACC', 'ASR')
    )
    assert acc == (
        'ACC over epochs, a line a defense. ft: 95.0 % at first, 94.0 % after 5 epochs. '
        'aft: 95.0 % at first, 94.0 % after 5 epochs, lowest 90.0 % after 2.5.'
    )
    assert 'ft: 99.0 % at first, 98.0 % after 5 epochs. aft: 99.0 % at first, 1.0 % after 5 epochs.' in asr
    lines = whole[0] / 'metrics.jsonl'
    # What was watched is not the model of the table, or its trigger is not known.
    assert not purification_curves.read(lines, {'ft': scores(0.9, 0.5), 'mcr': scores(0.94, 0.01)})
    unknown = purification_curves.read(lines, {'aft': scores(0.94, None)})
    assert [panel.name for panel in purification_curves.draw(tmp_path, unknown, scores(0.95, None))] == [
        'purification_acc'
    ]


def test_the_numbers_are_there(whole):
    said = Reader(whole[1]).said
    assert 'model ACC ASR RA DER seconds infected 95.0 % 99.0 % 1.0 % – 1.5 ft 94.0 %' in said
    assert '80.0 % → –' in said  # no adversarial example fools the purified model
    assert 'infected 25.0 % 80.0 % 70.0 % to 90.0 % 2.50 2.00 to 3.00 50.0 % – aft 25.0 % –' in said
    assert 'Training images with the trigger stored in them 7' in said and 'aft.eps 0.125 aft.preset –' in said


def test_without_an_attack_nothing_is_said_of_a_trigger(tmp_path):
    outcome = results(scores(0.95, None), attack='none', aft=scores(0.94, None, der=None))
    read = Reader(write(tmp_path, outcome, observation(triggered=False)))
    assert read.sections == ['examples', 'landing', 'inside', 'made']
    assert 'model ACC seconds benign' in read.said
    assert not re.search(r'ASR|triggered|attacker|\btarget|DER', read.said)


def test_a_suspect_of_unknown_trigger(tmp_path):
    scans = [{'score': score} for score in (0.9, 0.125)]
    suspect = {'acc': 0.95, 'asr': None, 'scan': scans[0], 'warning': 'mean <0.5>'}
    outcome = results(suspect, attack='unknown', aft=scores(0.94, None, scan=scans[1]))
    read = Reader(write(tmp_path, outcome, observation(triggered=False, features=False)))
    assert read.sections == ['examples', 'landing', 'made']
    assert 'trigger not known' in read.said and 'Warning: mean <0.5>' in read.said
    assert 'suspect 95.0 % 0.900 – aft 94.0 % 0.125 1.5' in read.said
    assert 'from 0.90 to 0.12' in read.said or 'from 0.90 to 0.13' in read.said


def test_without_an_observation(tmp_path):
    read = Reader(write(tmp_path, results(scores(0.95, 0.99)), None))
    assert read.sections == ['made'] and 'Nothing was purified yet' in read.said


@pytest.mark.parametrize(
    ('outcome', 'says'),
    [
        (
            results(scores(0.9, 0.99), aft=scores(0.89, 0.05)),
            r'AFT erased the backdoor: 5\.0 %.*\(99\.0 % before\).*falls',
        ),
        (
            results(scores(0.9, 0.99), aft=scores(0.87, 0.01)),
            'AFT erased the backdoor, but at a price.*90.0 % to 87.0 %',
        ),
        (
            results(scores(0.9, 0.99), aft=scores(0.9, 0.06)),
            'AFT weakened the backdoor but did not erase it.*stays at 90',
        ),
        (
            results(scores(0.9, 0.99), ft=scores(0.91, 0.5)),
            'FT did not erase the backdoor: 50.0 %.*rises from 90.0 % to 91',
        ),
        (results(scores(0.9, 0.99), aft=scores(0.9, 0.0), ft=scores(0.9, 0.99)), '^AFT erased'),
        (results(scores(0.9, 0.3), aft=scores(0.9, 0.0)), r'hardly took \(30.0 % of'),
        (
            results(scores(0.9, None), 'none', aft=scores(0.88, None)),
            'no backdoor to erase; under AFT.*falls from 90.0 % to 88.0 %',
        ),
        (
            results(scores(0.9, None), 'unknown', ft=scores(0.9, None)),
            'cannot be told without its trigger: under FT clean',
        ),
        (results(scores(0.9, 1.0)), 'Nothing was purified yet: 100.0 % of triggered'),
        (results(scores(0.9, None), 'none'), 'the benign model stands as it came'),
        (results(scores(0.9, None, scan={'score': 0.75}), 'unknown'), 'score of infection is 0.75'),
    ],
)
def test_the_verdict(outcome, says):
    sentence = verdict.sentence(outcome).replace('\u00a0', ' ')
    assert re.search(says, sentence) and sentence.endswith('.') and sentence.count('. ') == 0


def test_the_other_defenses_are_told_beside_it():
    assert verdict.others(results(scores(0.9, 0.99), aft=scores(0.9, 0.0), ft=scores(0.9, 0.98))) == (
        'For comparison, FT leaves 98.0\u00a0% of triggered images obeying.'
    )
    assert verdict.others(results(scores(0.9, 0.99), aft=scores(0.9, 0.0))) == ''


def test_landings_are_counted(tmp_path):
    labels = np.array([1, 1, 2, 2, 1, 2, 1, 1])
    said = {'infected': np.array([0, 0, 0, 1, 1, 2, 1, 1]), 'aft': labels}
    panel = observation_figures.landing(tmp_path, said, labels, np.zeros(3, int), NAMES)
    assert panel.alt.replace('\u00a0', ' ') == (
        'Bars, a row a class. infected: 50.0 % leave their class, most of them to zero (75.0 % of these); '
        '75.0 % of these go where the trigger commands. aft: none leaves its class.'
    )
    many = tuple(f'class {k}' for k in range(40))
    panel = observation_figures.landing(tmp_path, {'infected': np.arange(40)[::-1] // 3}, np.full(40, 39), None, many)
    assert panel.svg.count('class ') == observation_figures.MOST_CLASSES and '>others<' in panel.svg


def test_the_components_are_those_of_the_singular_values(tmp_path):
    generator = np.random.default_rng(0)
    channels = {kind: generator.normal(size=(20, 4)).astype(np.float32) for kind in ('clean', 'adversarial')}
    panel = observation_figures.features(tmp_path, 'aft', ModelOutputs({}, channels))
    stacked = np.concatenate(list(channels.values())).astype(np.float64)
    centred = stacked - stacked.mean(axis=0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    share = (singular[:2] ** 2).sum() / (singular**2).sum()
    moved = (channels['adversarial'].mean(axis=0) - channels['clean'].mean(axis=0)) @ axes[:2].T
    assert f'{100 * share:.1f}\u00a0% of the variance' in panel.alt
    assert f'is {np.linalg.norm(moved):.2f} from that of the clean ones.' in panel.alt
    channels['clean'][0, 0] = np.nan
    assert observation_figures.features(tmp_path, 'aft', ModelOutputs({}, channels)) is None


class Linear(nn.Module):
    """Logits and one feature map that are linear in the pixels."""

    @nn.compact
    def __call__(self, images, train=False, features=False):
        maps = nn.Dense(4)(images.reshape((len(images), -1)) - 0.5)
        return (maps, (maps[:, None, None],)) if features else maps


class Hidden(nn.Module):
    """A network of someone's own, which does not show its feature maps."""

    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(4)(images.reshape((len(images), -1)))


def observe(module, dataset, config, make_run, attack_name, outcome):
    config.attack.name = attack_name
    attack = attacks.build(config, dataset.image_shape, dataset.num_classes)
    infected, aft = (module.init(jax.random.key(k), jnp.zeros((1, 8, 8, 1))) for k in (0, 1))
    nobody = Poisoned(dataset.train_images, dataset.train_labels, NO_INDICES, NO_INDICES)
    scenario = Scenario(dataset, attack, nobody, np.arange(8, dtype=np.int32), module)
    run = make_run()
    found = observe_module.observe(
        run, scenario, InfectedModel(infected, attack, 1.0), {'aft': aft}, evaluator_for(run, scenario), outcome
    )
    return found, infected['params']['Dense_0']


def test_what_is_observed(dataset, config, make_run):
    earlier = {'purified': {'ft': connected(0.3), 'aft': connected(0.4)}}
    outcome = results(scores(0.9, 0.9), attack='badnets') | {'connection': earlier}
    found, dense = observe(Linear(), dataset, config, make_run, 'badnets', outcome)
    kept = dataset.test_labels != 0
    np.testing.assert_array_equal(found.labels, dataset.test_labels[kept])
    np.testing.assert_array_equal(found.images['clean'], dataset.test_images[kept])
    kernel, bias = (np.asarray(dense[name], np.float64) for name in ('kernel', 'bias'))
    for kind, images in found.images.items():
        logits = (images.reshape(len(images), -1) / 255 - 0.5) @ kernel + bias
        np.testing.assert_allclose(found.outputs['infected'].channels[kind], logits, atol=0.02)
    gap = found.images['adversarial'].astype(int) - found.images['clean']
    assert 1 <= np.abs(gap).max() <= 8
    np.testing.assert_array_equal(found.transferred['infected'], found.outputs['infected'].predictions['adversarial'])
    said = found.outputs['infected'].predictions['adversarial']
    share = np.mean(said[said != found.labels] == 0)
    assert found.connection['target_share'] == pytest.approx(share, abs=1e-6)
    assert found.swept['infected'][found.swept_eps.index(found.eps)].value == pytest.approx(share)
    assert list(found.outputs) == ['infected', 'aft'] == list(found.swept)
    purified = found.connection['purified']
    assert purified['ft'] == connected(0.3) and purified['aft'].keys() > {'fooled', 'norm'}


def test_what_is_observed_without_a_trigger_or_feature_maps(dataset, config, make_run):
    outcome = results(scores(0.9, None), attack='unknown')
    found, _ = observe(Hidden(), dataset, config, make_run, 'none', outcome)
    assert found.images.keys() == {'clean', 'adversarial'} and found.outputs.keys() == {'suspect', 'aft'}
    assert len(found.labels) == len(dataset.test_labels)
    assert found.target_map is found.connection is None and not found.swept
    assert found.outputs['aft'].predictions.keys() == {'clean', 'adversarial'} and not found.outputs['aft'].channels


@pytest.mark.skipif(BROWSER is None, reason='no browser to measure the page with')
def test_in_a_browser(whole, tmp_path):
    """Nothing overflows on a phone, no request leaves, and what is not chosen of a table is not shown."""
    shared = {'dataset': 'd', 'model': 'm', 'clean_share': 0.05, 'acc': 0.9, 'asr': 0.9, 'ra': 0.1, 'der': 0.5}
    cases = [('none', 'all2one'), ('sig', 'all2one'), ('sig', 'all2all'), ('wanet', 'all2one')]
    rows = [
        shared | {'attack': attack, 'label_mode': mode, 'defense': defense, 'seed': seed, 'seconds': 100.0 + seed}
        for attack, mode in cases
        for defense in ('none', 'a_defense_with_a_long_name', 'aft')
        for seed in (0, 1)
    ]
    table_page.write_table_page(tmp_path / 'table.html', aggregate.summarise(rows))
    question = """Object.entries(pages).map(([name, page]) => {
        const root = page.document.documentElement, resources = page.performance.getEntriesByType("resource")
        const shown = () => [...page.document.querySelectorAll(".case h3, .nothing")]
            .filter(one => one.getClientRects().length).map(one => one.textContent)
        const choose = (...ids) => ids.map(id => { page.document.getElementById(id)?.click(); return shown() })
        const sizes = [root.clientWidth > 300, root.scrollWidth - root.clientWidth, resources.length]
        return [name, ...sizes, shown(), ...choose("attack1", "mode1", "attack2", "attack0")] })"""
    seen = json.loads(look({'run': whole[1], 'table': (tmp_path / 'table.html').read_text()}, question, tmp_path))
    assert [row[:4] for row in seen] == [['run', True, 0, 0], ['table', True, 0, 0]]
    everything = ['benign', 'sig, all2one', 'sig, all2all', 'wanet, all2one']
    assert seen[1][4:7] == [everything, ['sig, all2one', 'sig, all2all'], ['sig, all2all']]
    assert re.match('This table has no run', seen[1][7][0]) and seen[1][7:] == [seen[1][7][:1], ['benign']]
