"""report/index.html: its content for each kind of first model, its figures, and that it is self-contained."""

import base64
import io
import json
import re
from xml.etree import ElementTree

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_results import results, scores, searched
from page_reader import BROWSER, Reader, look
from PIL import Image

from aft_jax import attacks
from aft_jax.adversarial.perturbations import spec_of_any_size
from aft_jax.analysis import observe as observe_module
from aft_jax.analysis.backdoor_scan import Scan
from aft_jax.analysis.infection_score import BackdoorHypothesis
from aft_jax.analysis.observation import ModelOutputs, Observation
from aft_jax.analysis.trigger_search import KINDS, FoundChange
from aft_jax.attacks.poison import NO_INDICES, Poisoned, write_manifest
from aft_jax.evaluation.bootstrap import NOTHING, Estimate
from aft_jax.pipeline.scenario import InfectedModel, Scenario
from aft_jax.pipeline.stages import evaluator_for
from aft_jax.report import found_changes, observation_figures, page, purification_curves, table_page, verdict
from aft_jax.results import aggregate
from aft_jax.results.record import Results
from aft_jax.results.workdir import RunFiles

NAMES = ('zero', '<one> & $two$', 'three')


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
        predictions = {kind: generator.integers(0, 3, 12, dtype=np.int32) for kind in kinds}
        return ModelOutputs(predictions, {k: generator.random((12, 5), np.float32) for k in kinds} if features else {})

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


def write(directory, measured, observed):
    page.write_page(RunFiles(directory), measured, observed, NAMES)
    return (directory / 'report' / 'index.html').read_text()


def metric_lines():
    """Lines of metrics.jsonl: FT tries two learning rates and takes the second, and the ACC of AFT dips."""
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
    """Work directory and page of an infected model that two defenses purified."""
    directory = tmp_path_factory.mktemp('run')
    empty = np.zeros((0, 6, 6, 1), np.uint8)
    write_manifest(directory / 'poison.npz', None, Poisoned(empty, NO_INDICES, np.arange(7), NO_INDICES), np.arange(5))
    (directory / 'config.json').write_text(json.dumps({'seed': 3, 'aft': {'averaging': 0.125, 'universal': ''}}))
    (directory / 'metrics.jsonl').write_text(
        ''.join(json.dumps(line) + '\n' for line in metric_lines()) + '{"step": 9, "sta'
    )
    observed = connected(0.8) | {'purified': {'aft': connected(None)}}
    purified = {'ft': scores(0.94, 0.98, der=0.5), 'aft': scores(0.94, 0.01, der=0.985)}
    measured = results(scores(0.95, 0.99), connection=observed, **purified)
    return directory, write(directory, measured, observation())


def test_write_page_is_self_contained(whole):
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


def test_write_page_describes_every_picture(whole):
    read = Reader(whole[1])
    assert len(read.all('img')) == 3 * 2 + 3 * 2 and len(read.all('svg')) == 8
    for attributes in read.all('svg'):
        assert attributes['role'] == 'img' and re.search(r'\d', attributes['aria-label'])
    alts = ' '.join(attributes['alt'] for attributes in read.all('img'))
    assert (
        'Adversarial image of class <one> & $two$: infected predicts <one> & $two$, aft predicts <one> & $two$.' in alts
    )


def test_purification_curves_are_those_of_the_final_models(whole, tmp_path):
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
    # No stage ends with the scores of the final model.
    others = results(scores(0.95, 0.99), ft=scores(0.9, 0.5), mcr=scores(0.94, 0.01))
    assert not purification_curves.read(lines, others.purified)
    given = results(scores(0.95), given=True, aft=scores(0.94))
    panels = purification_curves.draw(tmp_path, purification_curves.read(lines, given.purified), given.initial)
    assert [panel.name for panel in panels] == ['purification_acc']


def test_write_page_shows_the_numbers(whole):
    text = Reader(whole[1]).visible_text
    assert 'model ACC ASR RA DER seconds infected 95.0 % 99.0 % 1.0 % – 1.5 ft 94.0 %' in text
    assert '80.0 % → –' in text  # no adversarial example fools the purified model
    assert 'infected 25.0 % 80.0 % 70.0 % to 90.0 % 2.50 2.00 to 3.00 50.0 % – aft 25.0 % –' in text
    assert 'Training images with the trigger stored in them 7' in text and 'aft.averaging 0.125 aft.universal –' in text


def test_write_page_of_a_benign_model_has_no_word_of_a_trigger(tmp_path):
    measured = results(scores(0.95), attack='none', aft=scores(0.94))
    read = Reader(write(tmp_path, measured, observation(triggered=False)))
    assert read.sections == ['examples', 'landing', 'inside', 'made']
    assert 'model ACC seconds benign' in read.visible_text
    assert not re.search(r'ASR|triggered|attacker|\btarget|DER', read.visible_text)


def test_write_page_of_a_given_model(tmp_path):
    scans = [{'score': score} for score in (0.9, 0.125)]
    given = scores(0.95, scan=scans[0])
    measured = results(given, given=True, aft=scores(0.94, scan=scans[1]))
    measured.given = measured.given._replace(warning='mean <0.5>')
    read = Reader(write(tmp_path, measured, observation(triggered=False, features=False)))
    assert read.sections == ['examples', 'landing', 'made']
    assert 'trigger unknown' in read.visible_text and 'Warning: mean <0.5>' in read.visible_text
    assert 'suspect 95.0 % 0.900 – aft 94.0 % 0.125 1.5' in read.visible_text
    assert 'from 0.90 to 0.12' in read.visible_text or 'from 0.90 to 0.13' in read.visible_text


def scan_with(examples, kind='rectangle'):
    """A scan for pictures: its best change is on these examples."""
    change = FoundChange(kind, BackdoorHypothesis(0.75, 'all2one', np.zeros(3, np.int32)), 0.9, 0.1, examples)
    return Scan({}, (change,))


SEARCHED = searched('infected', ('rectangle', 1, 0.75, 0.875, 0.125), *[('mask', None, 0.5, 0.5, 0.0)] * 5)
NOT_ERASED = searched('not erased', ('mask', None, 0.5, 0.5, 0.0))
PURIFIED = searched('nothing found', ('warp', 0, 0.0625, 0.1875, 0.125))


def test_write_page_of_a_search_shows_what_it_found_and_tried(tmp_path):
    measured = results(scores(0.95, scan=SEARCHED), given=True, ft=scores(0.9), aft=scores(0.94, scan=PURIFIED))
    examples = np.random.default_rng(6).random((3, 6, 6, 1), np.float32)
    scans = {'none': scan_with(examples), 'aft': scan_with(1 - examples, 'warp')}
    text = page_of(tmp_path, measured, scans)
    read = Reader(text)
    assert read.sections == ['search', 'made']
    shown = read.visible_text.replace('\u00a0', ' ')
    assert 'Verdict on aft: no change of these kinds leads to one label any more: distortion; of' in shown
    first = 'suspect infected rectangle <one> & $two$ 87.5 % 12.5 % 75.0 % 25.0 %'
    mask = 'mask with a pattern one label a class 50.0 % 0.0 % 50.0 % 25.0 %'
    assert f'{first} {mask} {mask} aft nothing found distortion zero 18.8 % 12.5 % 6.2 % 25.0 % Images' in shown
    assert '75.0 % → 6.2 %' in shown
    assert '7 steps each' in shown and 'distortion 16 % of a side' in shown
    pictures = [decode(image['src']) for image in read.all('img')]
    np.testing.assert_array_equal(pictures, np.round(255 * np.concatenate([examples, 1 - examples]))[..., 0])
    assert read.all('img')[4]['alt'] == 'Image 2 of 3 with the best change for the aft model: distortion.'

    # A later start has the results alone.
    later = Reader(page_of(tmp_path, Results.from_json(measured.to_json()), {}))
    assert not later.all('img') and mask in later.visible_text.replace('\u00a0', ' ')


def page_of(directory, measured, scans):
    page.write_page(RunFiles(directory), measured, None, NAMES, scans)
    return (directory / 'report' / 'index.html').read_text()


def decode(source):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(',')[2]))))


def test_sizes_are_those_of_the_search():
    for kind in KINDS:
        largest = spec_of_any_size(kind, (1, 1, 1), factor=1.5).size
        assert found_changes.sizes(kind, 1.5).startswith(f'{100 * largest:.3g}\u00a0% ')
    assert found_changes.sizes('mask', 2.0).replace('\u00a0', ' ') == '4 % or 16 % of the area'
    assert set(found_changes.UNITS) == {*KINDS, 'mask'}


def test_write_page_without_an_observation(tmp_path):
    read = Reader(write(tmp_path, results(scores(0.95, 0.99)), None))
    assert read.sections == ['made'] and 'Nothing was purified yet' in read.visible_text


@pytest.mark.parametrize(
    ('measured', 'expected'),
    [
        (
            results(scores(0.9, 0.99), aft=scores(0.89, 0.05)),
            r'AFT erased the backdoor: 5\.0 %.*\(99\.0 % before\).*falls',
        ),
        (
            results(scores(0.9, 0.99), aft=scores(0.87, 0.01)),
            'AFT erased the backdoor, but at a cost.*90.0 % to 87.0 %',
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
        (results(scores(0.9, 0.3), aft=scores(0.9, 0.0)), r'hardly worked \(30.0 % of'),
        (
            results(scores(0.9), 'none', aft=scores(0.88)),
            'no backdoor to erase; under AFT.*falls from 90.0 % to 88.0 %',
        ),
        (
            results(scores(0.9), given=True, ft=scores(0.9)),
            'Without the trigger it is unknown.*: under FT clean',
        ),
        (results(scores(0.9, 1.0)), 'Nothing was purified yet: 100.0 % of triggered'),
        (results(scores(0.9), 'none'), 'this is the benign model'),
        (results(scores(0.9, scan={'score': 0.75}), given=True), 'infection score is 0.75'),
        (
            results(scores(0.9, scan=SEARCHED), given=True),
            r'^Infected: one rectangle.*to the label one in 87.5 % .*\(12.5 % under.*clean accuracy is 90.0 %',
        ),
        (
            results(scores(0.9, scan=PURIFIED), given=True),
            '^No change of these kinds leads to one label, and clean accuracy is 90.0 %',
        ),
        (
            results(scores(0.9, scan=SEARCHED), given=True, aft=scores(0.9, scan=PURIFIED)),
            '^No change of these kinds leads to one label any more under AFT, and clean accuracy stays at 90.0 %',
        ),
        (
            results(scores(0.9, scan=SEARCHED), given=True, aft=scores(0.8, scan=NOT_ERASED)),
            '^Not erased: under AFT one mask.*moves images of each class to another class in 50.0 %.*falls',
        ),
    ],
)
def test_sentence_of_each_outcome(measured, expected):
    sentence = verdict.sentence(measured).replace('\u00a0', ' ')
    assert re.search(expected, sentence) and sentence.endswith('.') and sentence.count('. ') == 0


def test_others_compares_the_other_defenses():
    assert verdict.others(results(scores(0.9, 0.99), aft=scores(0.9, 0.0), ft=scores(0.9, 0.98))) == (
        'For comparison, the attack success rate is 98.0\u00a0% under FT.'
    )
    assert verdict.others(results(scores(0.9, 0.99), aft=scores(0.9, 0.0))) == ''


def test_others_says_what_a_search_means():
    purified = results(scores(0.9, scan=SEARCHED), given=True, aft=scores(0.9, scan=PURIFIED))
    assert re.fullmatch('Tried: distortion; of .* Other changes may lead to one label.', verdict.others(purified))
    kept = results(scores(0.9, scan=SEARCHED), given=True, aft=scores(0.9, scan=NOT_ERASED))
    assert verdict.others(kept).startswith('Do not rely on this model')
    assert verdict.others(results(scores(0.9, scan=SEARCHED), given=True)) == 'Nothing was purified yet.'


def test_landing_counts_predicted_classes(tmp_path):
    labels = np.array([1, 1, 2, 2, 1, 2, 1, 1])
    predictions = {'infected': np.array([0, 0, 0, 1, 1, 2, 1, 1]), 'aft': labels}
    panel = observation_figures.landing(tmp_path, predictions, labels, np.zeros(3, int), NAMES)
    assert panel.alt.replace('\u00a0', ' ') == (
        'Bars, a row a class. infected: 50.0 % are misclassified, most of them as zero (75.0 % of these); '
        '75.0 % of these are classified as the target label. aft: none is misclassified.'
    )
    many = tuple(f'class {k}' for k in range(40))
    panel = observation_figures.landing(tmp_path, {'infected': np.arange(40)[::-1] // 3}, np.full(40, 39), None, many)
    assert panel.svg.count('class ') == observation_figures.MAX_CLASSES and '>others<' in panel.svg


def test_features_are_those_of_the_singular_values(tmp_path):
    generator = np.random.default_rng(0)
    channels = {kind: generator.normal(size=(20, 4)).astype(np.float32) for kind in ('clean', 'adversarial')}
    panel = observation_figures.features(tmp_path, 'aft', ModelOutputs({}, channels))
    stacked = np.concatenate(list(channels.values())).astype(np.float64)
    centred = stacked - stacked.mean(axis=0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    share = (singular[:2] ** 2).sum() / (singular**2).sum()
    moved = (channels['adversarial'].mean(axis=0) - channels['clean'].mean(axis=0)) @ axes[:2].T
    assert f'{100 * share:.1f}\u00a0% of the variance' in panel.alt
    assert f'is {np.linalg.norm(moved):.2f} from that of the clean points.' in panel.alt
    channels['clean'][0, 0] = np.nan
    assert observation_figures.features(tmp_path, 'aft', ModelOutputs({}, channels)) is None


class Linear(nn.Module):
    """A network whose logits and only feature map are linear in the pixels."""

    @nn.compact
    def __call__(self, images, train=False, features=False):
        maps = nn.Dense(4)(images.reshape((len(images), -1)) - 0.5)
        return (maps, (maps[:, None, None],)) if features else maps


class Hidden(nn.Module):
    """A network that does not return its feature maps."""

    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(4)(images.reshape((len(images), -1)))


def observe(module, dataset, config, make_run, attack_name, first):
    config.attack.name = attack_name
    attack = attacks.build(config, dataset.image_shape, dataset.num_classes)
    infected, aft = (module.init(jax.random.key(k), jnp.zeros((1, 8, 8, 1))) for k in (0, 1))
    nobody = Poisoned(dataset.train_images, dataset.train_labels, NO_INDICES, NO_INDICES)
    scenario = Scenario(dataset, attack, nobody, np.arange(8, dtype=np.int32), module)
    run = make_run()
    observed = observe_module.observe(
        run, scenario, InfectedModel(infected, attack, 1.0), {'aft': aft}, evaluator_for(run, scenario), first
    )
    return observed, infected['params']['Dense_0']


def test_observe_an_infected_model(dataset, config, make_run):
    observed, dense = observe(Linear(), dataset, config, make_run, 'badnets', 'infected')
    kept = dataset.test_labels != 0
    np.testing.assert_array_equal(observed.labels, dataset.test_labels[kept])
    np.testing.assert_array_equal(observed.images['clean'], dataset.test_images[kept])
    kernel, bias = (np.asarray(dense[name], np.float64) for name in ('kernel', 'bias'))
    for kind, images in observed.images.items():
        logits = (images.reshape(len(images), -1) / 255 - 0.5) @ kernel + bias
        np.testing.assert_allclose(observed.outputs['infected'].channels[kind], logits, atol=0.02)
    gap = observed.images['adversarial'].astype(int) - observed.images['clean']
    assert 1 <= np.abs(gap).max() <= 8
    np.testing.assert_array_equal(
        observed.transferred['infected'], observed.outputs['infected'].predictions['adversarial']
    )
    predictions = observed.outputs['infected'].predictions['adversarial']
    share = np.mean(predictions[predictions != observed.labels] == 0)
    assert observed.connection['target_share'] == pytest.approx(share, abs=1e-6)
    assert observed.swept['infected'][observed.swept_eps.index(observed.eps)].value == pytest.approx(share)
    assert list(observed.outputs) == ['infected', 'aft'] == list(observed.swept)
    assert observed.connection['purified'].keys() == {'aft'}
    assert observed.connection['purified']['aft'].keys() > {'fooled', 'norm'}


def test_observe_without_a_trigger_or_feature_maps(dataset, config, make_run):
    observed, _ = observe(Hidden(), dataset, config, make_run, 'none', 'suspect')
    assert observed.images.keys() == {'clean', 'adversarial'} and observed.outputs.keys() == {'suspect', 'aft'}
    assert len(observed.labels) == len(dataset.test_labels)
    assert observed.target_map is observed.connection is None and not observed.swept
    assert (
        observed.outputs['aft'].predictions.keys() == {'clean', 'adversarial'} and not observed.outputs['aft'].channels
    )


@pytest.mark.skipif(BROWSER is None, reason='no browser to measure the page with')
def test_look_in_a_browser(whole, tmp_path):
    """Nothing is wider than a phone, the pages make no request, and the filters of a table hide cases."""
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
