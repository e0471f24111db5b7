"""report/index.html: the experiment on one self-contained page."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from aft_jax.analysis.backdoor_scan import Scan
from aft_jax.analysis.observation import ADVERSARIAL, TRIGGERED, Observation
from aft_jax.files import write_text
from aft_jax.report import (
    example_cards,
    found_changes,
    observation_figures,
    purification_curves,
    run_facts,
    template,
    verdict,
)
from aft_jax.report.before_after import choose
from aft_jax.report.trigger_gallery import MAGNIFICATION
from aft_jax.results import clean_set_text, search_text
from aft_jax.results.record import ModelScores, Results, featured, percent
from aft_jax.results.workdir import RunFiles

EXAMPLES, TRIGGERS, TAINTED_IMAGES = 6, 3, 9
Format = Callable[[float | None], str]


def write_page(
    files: RunFiles,
    results: Results,
    observation: Observation | None,
    class_names: tuple[str, ...],
    scans: Mapping[str, Scan] = MappingProxyType({}),
    tainted: Sequence[np.ndarray] = (),
) -> None:
    """Writes index.html, and its figures as PNG and SVG files beside it.

    Args:
        files: Files of the run. The page also shows what the config, the manifest and the metrics contain, if they
            exist.
        results: Results of the experiment.
        observation: Observation of the models. Without one, the page has only numbers.
        class_names: Names of the K classes.
        scans: Scans of this start, for the pictures of `found_changes.content`.
        tainted: Images that look tainted and were left out, uint8 [H, W, C] each.
    """
    curves = purification_curves.read(files.metrics, results.purified)
    content = {
        'results': results,
        'setting': results.setting,
        'first': results.first_model,
        'verdict': verdict.sentence(results),
        'others': verdict.others(results),
        'clean_set': clean_set_text.tainted_lines(results) + clean_set_text.withheld_lines(results),
        'tainted': [example_cards.encode_png(image) for image in tainted[:TAINTED_IMAGES]],
        'keys': key_figures(results),
        'columns': columns(results),
        'scanned': results.initial.scan is not None,
        'search': found_changes.content(results, scans, class_names),
        'purification': purification_curves.draw(files.report, curves, results.initial),
        'connection': connection_rows(results),
        'marks': example_cards.MARKS,
        'magnification': MAGNIFICATION,
        'manifest': run_facts.manifest_rows(files.poison_manifest, class_names),
        'config': run_facts.config_rows(files.config),
    }
    content |= _observed(files.report, observation, class_names)
    files.report.mkdir(parents=True, exist_ok=True)
    write_text(files.report / 'index.html', template.render('page.html', content))


def key_figures(results: Results) -> list[dict[str, str]]:
    """Lists the few numbers at the top that exist: the title of each, and its value before and after purification."""
    defense = featured(results.purified) if results.purified else ''
    before, after = results.initial, results.purified.get(defense)
    scores = [_infection_score(before), _infection_score(after)]
    searches = search_text.searches(results)
    excesses = [_largest_excess(searches.get(name)) for name in (results.first_model, defense)]
    observed = results.observation or {}
    observed_after = observed.get('purified', {}).get(defense, {})
    shares = [observed.get('target_share'), observed_after.get('target_share')]
    numbers: list[tuple[str, Format, float | None, float | None]] = [
        ('Largest excess that the search for triggers found', percent, excesses[0], excesses[1]),
        ('Infection score', _decimal, scores[0], scores[1]),
        ('Attack success rate', percent, before.asr, after.asr if after else None),
        ('Clean accuracy', percent, before.acc, after.acc if after else None),
        ('Misclassified adversarial examples classified as the target', percent, shares[0], shares[1]),
    ]
    return [
        {'title': title, 'before': show(x), 'after': show(y) if defense else '', 'defense': defense}
        for title, show, x, y in numbers
        if x is not None
    ]


def columns(results: Results) -> dict[str, str]:
    """Lists the scores that at least one model has, with their titles."""
    titles = {'acc': 'ACC', 'asr': 'ASR', 'ra': 'RA', 'der': 'DER'}
    models = results.models.values()
    return {name: title for name, title in titles.items() if any(m.share(name) is not None for m in models)}


def connection_rows(results: Results) -> list[dict[str, str]]:
    """Formats the observation of each model as a row of text; empty without a known trigger."""
    observation = results.observation
    if not observation:
        return []
    models = {results.first_model: observation} | observation['purified']
    return [
        {
            'model': name,
            'fooled': percent(measured['fooled']),
            'target_share': percent(measured['target_share']),
            'target_interval': _interval(measured['intervals']['target_share'], percent),
            'distance': _decimal(measured['feature_distance']['own']),
            'distance_interval': _interval(measured['intervals']['feature_distance']['own'], _decimal),
            'top': percent(measured['neuron_overlap']['own']['top_10']),
            'correlation': _decimal(measured['neuron_overlap']['own']['correlation']),
        }
        for name, measured in models.items()
    ]


def _observed(directory: Path, observation: Observation | None, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Draws the figures of the observation, and collects its example images. Every part may be missing."""
    lists: dict[str, Any] = {name: [] for name in ('triggers', 'examples', 'activations', 'features')}
    nothing = lists | {'landing': None, 'target_share': None}
    if observation is None:
        return nothing | {'eps': '', 'images': 0}
    first, *defenses = observation.outputs
    shown = [first] + ([featured(defenses)] if defenses else [])
    outputs = {name: observation.outputs[name] for name in shown}
    with_features = {name: output for name, output in outputs.items() if output.channels}
    chosen = choose(observation.labels, observation.target_map, EXAMPLES)
    drawn = nothing | {
        'eps': f'{255 * observation.eps:g}/255',
        'images': len(observation.labels),
        'examples': [example_cards.example(observation, int(i), shown, class_names) for i in chosen],
        'landing': observation_figures.landing(
            directory,
            {name: output.predictions[ADVERSARIAL] for name, output in outputs.items()},
            observation.labels,
            observation.target_map,
            class_names,
        ),
        'activations': [observation_figures.activations(directory, *item) for item in with_features.items()],
    }
    features = [observation_figures.features(directory, *item) for item in with_features.items()]
    drawn['features'] = [panel for panel in features if panel is not None]
    if TRIGGERED in observation.images:
        drawn['triggers'] = [example_cards.trigger(observation, int(i), class_names) for i in chosen[:TRIGGERS]]
    if observation.swept:
        drawn['target_share'] = observation_figures.target_share(directory, observation.swept_eps, observation.swept)
    return drawn


def _infection_score(model: ModelScores | None) -> float | None:
    return model.scan['score'] if model is not None and model.scan else None


def _largest_excess(search: dict[str, Any] | None) -> float | None:
    return search['changes'][0]['excess'] if search is not None else None


def _decimal(value: float | None) -> str:
    return '–' if value is None else f'{value:.2f}'


def _interval(bounds: list[float | None], show: Format) -> str:
    low, high = bounds
    return '' if low is None or high is None else f'{show(low)} to {show(high)}'
