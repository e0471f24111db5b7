"""report/index.html: what it shows of each kind of run, that it needs nothing beside it, and what its figures tell."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aft_jax import attacks, exhibition
from aft_jax.analysis.bootstrap import NOTHING, Estimate
from aft_jax.attacks.poison import NO_INDICES, Poisoned, write_manifest
from aft_jax.judge import Judge
from aft_jax.report import page, panels, verdict
from aft_jax.report.observation import Observation, Seen
from aft_jax.victim import Infected, Victim

NAMES = ('zero', '<one> & $two$', 'three')
VOID = {'meta', 'img', 'br', 'link', 'input', 'hr', 'path', 'use', 'rect'}
BROWSER = next(
    (path for name in ('chromium', 'chromium-browser', 'google-chrome') if (path := shutil.which(name))), None
)


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
        return Seen(said, {k: generator.random((12, 5), np.float32) for k in kinds} if features else {})

    return Observation(
        labels=labels,
        target_map=np.zeros(3, np.int32) if triggered else None,
        eps=8 / 255,
        images={kind: generator.integers(0, 256, (12, 6, 6, 1), np.uint8) for kind in kinds},
        seen={name: seen() for name in models},
        transferred={name: labels for name in models},
        swept_eps=(2 / 255, 4 / 255),
        swept={name: [NOTHING, Estimate(0.5, 0.25, 0.75)] for name in ('infected', 'aft')} if triggered else {},
        connection=connected(0.8) if triggered else None,
    )


class Reader(HTMLParser):
    """Keeps every tag with its attributes, and finds tags that are not closed where they should be."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ''
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {'style', 'svg'} & set(self.open):
            self.text += f' {data}'

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def sections(self):
        return [attributes['id'] for attributes in self.all('section') if 'id' in attributes]

    @property
    def said(self):
        return ' '.join(self.text.split())


def write(directory, outcome, seen):
    page.write_page(directory / 'report', outcome, seen, NAMES)
    return (directory / 'report' / 'index.html').read_text()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The page of an infected model that two defenses purified, with its directory."""
    directory = tmp_path_factory.mktemp('run')
    empty = np.zeros((0, 6, 6, 1), np.uint8)
    write_manifest(directory / 'poison.npz', None, Poisoned(empty, NO_INDICES, np.arange(7), NO_INDICES), np.arange(5))
    (directory / 'config.json').write_text(json.dumps({'seed': 3, 'aft': {'eps': 0.125, 'preset': ''}}))
    outcome = results(scores(0.95, 0.99), ft=scores(0.94, 0.98, der=0.5), aft=scores(0.94, 0.01, der=0.985))
    outcome['connection'] = connected(0.8) | {'purified': {'aft': connected(None)}}
    return directory, write(directory, outcome, observation())


def test_the_page_stands_by_itself(whole):
    directory, text = whole
    read = Reader(text)
    assert not read.all('script') and not read.all('link')
    for _, attributes in read.tags:
        for name in ('src', 'href', 'xlink:href', 'srcset', 'data'):
            assert re.match(r'data:image/png;base64,|#|https://arxiv\.org/abs/', attributes.get(name) or '#')
    assert re.findall(r'url\((?!#)', text) == [] and '@import' not in text
    identities = [attributes['id'] for _, attributes in read.tags if 'id' in attributes]
    assert len(identities) == len(set(identities))
    wanted = {attributes['xlink:href'][1:] for attributes in read.all('use')} | set(re.findall(r'url\(#(.*?)\)', text))
    assert wanted and wanted <= set(identities)
    assert read.sections == ['trigger', 'examples', 'landing', 'inside', 'connection', 'made']
    for name in (
        'landing',
        'target_share',
        *(f'{f}_{m}' for f in ('activations', 'features') for m in ('infected', 'aft')),
    ):
        assert (directory / 'report' / f'{name}.png').read_bytes()[:4] == b'\x89PNG'
        assert ElementTree.parse(directory / 'report' / f'{name}.svg').getroot().tag.endswith('svg')


def test_everything_seen_is_told(whole):
    read = Reader(whole[1])
    assert len(read.all('img')) == 3 * 2 + 3 * 2 and len(read.all('svg')) == 6
    assert all(len(attributes['alt']) > 20 for attributes in read.all('img'))
    for attributes in read.all('svg'):
        assert attributes['role'] == 'img' and re.search(r'\d', attributes['aria-label'])
    alts = ' '.join(attributes['alt'] for attributes in read.all('img'))
    assert 'Adversarial image of class <one> & $two$: infected says <one> & $two$, aft says <one> & $two$.' in alts


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
    panel = panels.landing(tmp_path, said, labels, np.zeros(3, int), NAMES)
    assert panel.alt.replace('\u00a0', ' ') == (
        'Bars, a row a class. infected: 50.0 % leave their class, most of them to zero (75.0 % of these); '
        '75.0 % of these go where the trigger commands. aft: none leaves its class.'
    )
    many = tuple(f'class {k}' for k in range(40))
    panel = panels.landing(tmp_path, {'infected': np.arange(40)[::-1] // 3}, np.full(40, 39), None, many)
    assert panel.svg.count('class ') == panels.MOST_CLASSES and '>others<' in panel.svg


def test_the_components_are_those_of_the_singular_values(tmp_path):
    generator = np.random.default_rng(0)
    channels = {kind: generator.normal(size=(20, 4)).astype(np.float32) for kind in ('clean', 'adversarial')}
    panel = panels.features(tmp_path, 'aft', Seen({}, channels))
    stacked = np.concatenate(list(channels.values())).astype(np.float64)
    centred = stacked - stacked.mean(axis=0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    share = (singular[:2] ** 2).sum() / (singular**2).sum()
    moved = (channels['adversarial'].mean(axis=0) - channels['clean'].mean(axis=0)) @ axes[:2].T
    assert f'{100 * share:.1f}\u00a0% of the variance' in panel.alt
    assert f'is {np.linalg.norm(moved):.2f} from that of the clean ones.' in panel.alt
    channels['clean'][0, 0] = np.nan
    assert panels.features(tmp_path, 'aft', Seen({}, channels)) is None


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
    victim = Victim(dataset, attack, nobody, np.arange(8, dtype=np.int32), module)
    run = make_run()
    found = exhibition.observe(run, victim, Infected(infected, attack, 1.0), {'aft': aft}, Judge(victim, run), outcome)
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
        np.testing.assert_allclose(found.seen['infected'].channels[kind], logits, atol=0.02)
    gap = found.images['adversarial'].astype(int) - found.images['clean']
    assert 1 <= np.abs(gap).max() <= 8
    np.testing.assert_array_equal(found.transferred['infected'], found.seen['infected'].said['adversarial'])
    said = found.seen['infected'].said['adversarial']
    share = np.mean(said[said != found.labels] == 0)
    assert found.connection['target_share'] == pytest.approx(share, abs=1e-6)
    assert found.swept['infected'][found.swept_eps.index(found.eps)].value == pytest.approx(share)
    assert list(found.seen) == ['infected', 'aft'] == list(found.swept)
    purified = found.connection['purified']
    assert purified['ft'] == connected(0.3) and purified['aft'].keys() > {'fooled', 'norm'}


def test_what_is_observed_without_a_trigger_or_feature_maps(dataset, config, make_run):
    outcome = results(scores(0.9, None), attack='unknown')
    found, _ = observe(Hidden(), dataset, config, make_run, 'none', outcome)
    assert found.images.keys() == {'clean', 'adversarial'} and found.seen.keys() == {'suspect', 'aft'}
    assert len(found.labels) == len(dataset.test_labels)
    assert found.target_map is found.connection is None and not found.swept
    assert found.seen['aft'].said.keys() == {'clean', 'adversarial'} and not found.seen['aft'].channels


@pytest.mark.skipif(BROWSER is None, reason='no browser to measure the page with')
def test_nothing_overflows_on_a_phone(whole, tmp_path):
    measure = (
        '<script>onload = () => { const d = document.querySelector("iframe").contentDocument.documentElement;'
        'document.title = d.scrollWidth + " of " + d.clientWidth }</script>'
    )
    framed = f'<iframe width="390" height="844" style="border:0" srcdoc="{html.escape(whole[1])}"></iframe>{measure}'
    (tmp_path / 'frame.html').write_text(framed)
    flags = ['--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path}/profile', '--dump-dom']
    address = (tmp_path / 'frame.html').as_uri()
    seen = subprocess.run([BROWSER, *flags, address], capture_output=True, text=True, timeout=120).stdout
    assert re.search(r'<title>(\d+) of \1</title>', seen)
