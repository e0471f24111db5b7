"""report/index.html: the run on one page that needs nothing beside it."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from aft_jax.analysis.observation import ADVERSARIAL, CLEAN, TRIGGERED, Observation
from aft_jax.files import write_text
from aft_jax.report import observation_figures, purification_curves, run_facts, template, verdict
from aft_jax.report.before_after import choose
from aft_jax.report.trigger_gallery import MAGNIFICATION, magnified_difference
from aft_jax.results.record import featured, first_model, percent

EXAMPLES, TRIGGERS = 6, 3
# Larger images are made smaller for the page, in pixels.
LARGEST_SIDE = 128
Show = Callable[[float | None], str]
MARKS = {'true': '✓', 'commanded': '⚑', 'other': '≠'}


def write_page(
    directory: Path, outcome: dict[str, Any], observation: Observation | None, class_names: tuple[str, ...]
) -> None:
    """Writes index.html, and its figures as PNG and SVG files beside it.

    Args:
        directory: Where they go; config.json, poison.npz and metrics.jsonl are looked for in the one above.
        outcome: What results.json holds.
        observation: What the models make of test images; without one the page has its numbers alone.
        class_names: K names.
    """
    watched = purification_curves.read(directory.parent / 'metrics.jsonl', outcome['purified'])
    content = {
        'outcome': outcome,
        'first': first_model(outcome),
        'verdict': verdict.sentence(outcome),
        'others': verdict.others(outcome),
        'keys': key_figures(outcome),
        'columns': columns(outcome),
        'rows': {first_model(outcome): outcome['infected']} | outcome['purified'],
        'scanned': bool(outcome['infected'].get('scan')),
        'purification': purification_curves.draw(directory, watched, outcome['infected']),
        'connection': connection_rows(outcome),
        'marks': MARKS,
        'magnification': MAGNIFICATION,
        'manifest': run_facts.manifest_rows(directory.parent / 'poison.npz', class_names),
        'config': run_facts.config_rows(directory.parent / 'config.json'),
    }
    content |= _seen(directory, observation, class_names)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / 'index.html', template.render('page.html', content))


def key_figures(outcome: dict[str, Any]) -> list[dict[str, str]]:
    """Returns the few numbers at the top: what each is, before and after; only those that exist."""
    defense = featured(outcome['purified']) if outcome['purified'] else None
    after = outcome['purified'][defense] if defense else {}
    connection = outcome.get('connection') or {}
    scanned, scanned_after = (row['scan']['score'] if row.get('scan') else None for row in (outcome['infected'], after))
    numbers: list[tuple[str, float | None, float | None, Show]] = [
        ('Score of infection', scanned, scanned_after, _number),
        ('Attack success rate', outcome['infected'].get('asr'), after.get('asr'), percent),
        ('Clean accuracy', outcome['infected'].get('acc'), after.get('acc'), percent),
        (
            'Adversarial examples that fool go to the target',
            connection.get('target_share'),
            connection.get('purified', {}).get(defense, {}).get('target_share'),
            percent,
        ),
    ]
    return [
        {'title': title, 'before': show(x), 'after': show(y) if defense else '', 'defense': defense or ''}
        for title, x, y, show in numbers
        if x is not None
    ]


def columns(outcome: dict[str, Any]) -> dict[str, str]:
    """Returns the shares that the table has columns for, with their titles: those that some model has."""
    titles = {'acc': 'ACC', 'asr': 'ASR', 'ra': 'RA', 'der': 'DER'}
    rows = [outcome['infected'], *outcome['purified'].values()]
    return {name: title for name, title in titles.items() if any(row.get(name) is not None for row in rows)}


def connection_rows(outcome: dict[str, Any]) -> list[dict[str, str]]:
    """Returns the observation of each model as text, a row a model; none without a known trigger."""
    connection = outcome.get('connection')
    if not connection:
        return []
    models = {first_model(outcome): connection} | connection['purified']
    return [
        {
            'model': name,
            'fooled': percent(found['fooled']),
            'target_share': percent(found['target_share']),
            'target_interval': _interval(found['intervals']['target_share'], percent),
            'distance': _number(found['feature_distance']['own']),
            'distance_interval': _interval(found['intervals']['feature_distance']['own'], _number),
            'top': percent(found['neuron_overlap']['own']['top_10']),
            'correlation': _number(found['neuron_overlap']['own']['correlation']),
        }
        for name, found in models.items()
    ]


def _seen(directory: Path, observation: Observation | None, class_names: tuple[str, ...]) -> dict[str, Any]:
    """What the page shows of the observation; every part of it may be missing."""
    lists: dict[str, Any] = {name: [] for name in ('triggers', 'examples', 'activations', 'features')}
    nothing = lists | {'landing': None, 'target_share': None}
    if observation is None:
        return nothing | {'eps': '', 'images': 0}
    first, *defenses = observation.outputs
    shown = [first] + ([featured(defenses)] if defenses else [])
    seen = {name: observation.outputs[name] for name in shown}
    adversarial = {name: found.predictions[ADVERSARIAL] for name, found in seen.items()}
    inside = {name: found for name, found in seen.items() if found.channels}
    chosen = choose(observation.labels, observation.target_map, EXAMPLES)
    return nothing | {
        'eps': f'{255 * observation.eps:g}/255',
        'images': len(observation.labels),
        'triggers': _triggers(observation, chosen[:TRIGGERS], class_names) if TRIGGERED in observation.images else [],
        'examples': [_example(observation, int(i), shown, class_names) for i in chosen],
        'landing': observation_figures.landing(
            directory, adversarial, observation.labels, observation.target_map, class_names
        ),
        'activations': [observation_figures.activations(directory, name, found) for name, found in inside.items()],
        'features': [
            p for name, found in inside.items() if (p := observation_figures.features(directory, name, found))
        ],
        'target_share': (
            observation_figures.target_share(directory, observation.swept_eps, observation.swept)
            if observation.swept
            else None
        ),
    }


def _triggers(observation: Observation, chosen: np.ndarray, class_names: tuple[str, ...]) -> list[dict[str, Any]]:
    cards = []
    for i in chosen:
        clean, triggered = observation.images[CLEAN][i], observation.images[TRIGGERED][i]
        name = class_names[observation.labels[i]]
        change = np.abs(triggered.astype(int) - clean.astype(int))
        changed = percent(float(np.mean(change.max(axis=-1) > 0)))
        told = f'changes {changed} of the pixels, by {change.max()} of 255 at most'
        pictures = {
            CLEAN: (clean, f'A clean image of class {name}.'),
            TRIGGERED: (triggered, f'The same image with the trigger, which {told}.'),
            f'difference ×{MAGNIFICATION}': (
                magnified_difference(clean, triggered),
                f'The difference, magnified {MAGNIFICATION} times about grey: the trigger {told}.',
            ),
        }
        shown = [
            {'kind': kind, 'source': _png(image), 'alt': alt, 'answers': []} for kind, (image, alt) in pictures.items()
        ]
        cards.append({'name': name, 'pictures': shown})
    return cards


def _example(observation: Observation, i: int, shown: list[str], class_names: tuple[str, ...]) -> dict[str, Any]:
    label = int(observation.labels[i])
    commanded = int(observation.target_map[label]) if observation.target_map is not None else -1
    pictures = []
    for kind, images in observation.images.items():
        answers = []
        for name in shown:
            # The same picture for all models, which is the first one's adversarial example.
            said = observation.transferred[name] if kind == ADVERSARIAL else observation.outputs[name].predictions[kind]
            answer = int(said[i])
            mark = 'true' if answer == label else 'commanded' if answer == commanded else 'other'
            answers.append({'model': name, 'says': class_names[answer], 'mark': mark})
        told = ', '.join(f'{a["model"]} says {a["says"]}' for a in answers)
        alt = f'{kind.capitalize()} image of class {class_names[label]}: {told}.'
        pictures.append({'kind': kind, 'source': _png(images[i]), 'alt': alt, 'answers': answers})
    return {'name': class_names[label], 'pictures': pictures}


def _png(image: np.ndarray) -> str:
    """The image, uint8 [H, W, C], as a data: address."""
    from PIL import Image

    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, 'PNG', optimize=True)
    return f'data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'


def _number(value: float | None) -> str:
    return '–' if value is None else f'{value:.2f}'


def _interval(bounds: list[float | None], show: Show) -> str:
    low, high = bounds
    return '' if low is None or high is None else f'{show(low)} to {show(high)}'
