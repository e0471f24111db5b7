"""The section of an experiment's page about the search for triggers: what it found and tried, with pictures."""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from aft_jax.adversarial.kinds import Kind
from aft_jax.adversarial.perturbations import largest_size
from aft_jax.analysis.backdoor_scan import Scan
from aft_jax.analysis.trigger_search import MASK_AREAS
from aft_jax.config import UNPURIFIED
from aft_jax.report.example_cards import encode_png
from aft_jax.results import search_text
from aft_jax.results.record import Results, featured, percent

# Meaning of the size of each kind. Rotation and scaling of 'affine' grow with its shift.
UNITS = {
    'linf': 'of the range of pixels, for each pixel',
    'l2': 'of the range of pixels, as a root mean square',
    'low_frequency': 'of the range of pixels, for each pixel',
    'rectangle': 'of the area',
    'region': 'of the area',
    'mask': 'of the area',
    'tone': 'change of the gain',
    'blur': 'of a Gaussian blur; above 100\u00a0% for sharpening only',
    'warp': 'of a side, for each point',
    'affine': 'of a side as a shift, rotation and scaling in proportion',
}


def content(results: Results, scans: Mapping[str, Scan], class_names: tuple[str, ...]) -> dict[str, Any] | None:
    """Collects the content of the section; None if no model was searched.

    Args:
        results: Results of the experiment.
        scans: Scans of this start by defense, and by UNPURIFIED for the first model. A model that an earlier start
            has scanned has no picture.
        class_names: Names of the K classes.
    """
    searches = search_text.searches(results)
    judged = search_text.judged_model(results)
    if judged is None:
        return None
    shown = [results.first_model] + ([featured(results.purified)] if results.purified else [])
    cards = []
    for name in shown:
        scan = scans.get(UNPURIFIED if name == results.first_model else name)
        if scan is not None and name in searches:
            best = searches[name]['changes'][0]
            examples = next(change.examples for change in scan.changes if change.kind == best['kind'])
            cards.append(_card(name, best, examples, class_names))
    return {
        'verdict': search_text.verdict_line(results),
        'rows': [row for name, search in searches.items() for row in _rows(name, search, class_names)],
        'tried': [
            (search_text.KIND_NAMES[change['kind']], sizes(change['kind'], searches[judged]['factor']))
            for change in searches[judged]['changes']
        ],
        'steps': searches[judged]['steps'],
        'cards': cards,
    }


def sizes(kind: str, factor: float) -> str:
    """Describes the size that a search tries of a kind, such as '30 % of the area'.

    Args:
        kind: Kind of a change.
        factor: Factor of the largest size that AFT trains with.
    """
    if kind == 'mask':
        return f'{" or ".join(_share(factor * area) for area in MASK_AREAS)} {UNITS[kind]}'
    known = cast(Kind, kind)
    return f'{_share(largest_size(known, factor))} {UNITS[kind]}'


def _rows(name: str, search: dict[str, Any], class_names: tuple[str, ...]) -> list[dict[str, str]]:
    """Formats the first changes of a model as rows. The first row alone names the model."""
    return [
        {
            'model': name if i == 0 else '',
            'verdict': search['verdict'] if i == 0 else '',
            'kind': search_text.KIND_NAMES[change['kind']],
            'label': search_text.label_name(change, class_names),
            'share': percent(change['share']),
            'reference_share': percent(change['reference_share']),
            'excess': percent(change['excess']),
            'limit': percent(change['limit']),
        }
        for i, change in enumerate(search['changes'][: search_text.SHOWN_CHANGES])
    ]


def _card(name: str, change: dict[str, Any], examples: np.ndarray, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Makes the card of a model: images that carry its best change, float32 [N, H, W, C], and a sentence about it."""
    pictures = np.round(255 * np.clip(examples, 0, 1)).astype(np.uint8)
    kind = search_text.KIND_NAMES[change['kind']]
    alt = f'Image {{}} of {len(pictures)} with the best change for the {name} model: {kind}.'
    return {
        'name': name,
        'text': search_text.describe(change, class_names),
        'pictures': [{'source': encode_png(image), 'alt': alt.format(i)} for i, image in enumerate(pictures, 1)],
    }


def _share(value: float) -> str:
    return f'{100 * value:.3g}\u00a0%'
