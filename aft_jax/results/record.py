"""results.json, the contract that scripts and people read, and the table on the terminal.

Shares are in 0..1, times in seconds; a share that does not exist (ASR without an attack) is null.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from aft_jax.evaluation.scores import PoisonDetection, Scores, defense_effectiveness

SCHEMA = 1
# Of the adversarial examples of a scan, that which the table shows.
SHOWN_EPS = 8 / 255


def begin(config: ml_collections.ConfigDict, mesh: Mesh, path: Path) -> dict[str, Any]:
    """Returns the results of an experiment that has measured nothing yet in this start.

    Args:
        config: The resolved config.
        mesh: The devices.
        path: Of results.json, from which defenses that an earlier start of the same config measured are kept, and the
            observation.
    """
    try:
        found = json.loads(path.read_text())
        earlier, connection = found['purified'], found.get('connection')
    except (OSError, ValueError, KeyError):
        earlier, connection = {}, None
    return {
        'schema': SCHEMA,
        'dataset': config.dataset,
        'model': config.model.name,
        'attack': config.attack.name,
        'label_mode': config.attack.label_mode,
        'seed': config.seed,
        'clean_share': config.clean_share,
        'infected': {},
        'purified': earlier,
        'environment': {
            'jax': jax.__version__,
            'backend': jax.default_backend(),
            'devices': mesh.size,
            'processes': jax.process_count(),
        },
    } | ({'connection': connection} if connection else {})


def add_infected(outcome: dict[str, Any], scores: Scores, seconds: float) -> None:
    """Adds the scores of the infected model, and what its training took."""
    outcome['infected'] = _shares(scores) | {'seconds': round(seconds, 3), 'per_class': _per_class(scores)}


def add_suspect(outcome: dict[str, Any], scores: Scores, facts: dict[str, Any]) -> None:
    """Adds what is known of a model that was there already, whose trigger nobody knows; 'infected' stays empty.

    Args:
        outcome: To be added to.
        scores: Of the model, without an attack.
        facts: 'init_from', 'class_names' and 'warning'; 'scan' where it was scanned.
    """
    outcome['suspect'] = facts | _shares(scores) | {'per_class': _per_class(scores)}


def as_shown(outcome: dict[str, Any]) -> dict[str, Any]:
    """Returns results as a report shows them: a suspect model in the place of the infected one, its attack unknown."""
    if 'suspect' not in outcome:
        return outcome
    return outcome | {'attack': 'unknown', 'infected': outcome['suspect']}


def add_purified(outcome: dict[str, Any], defense: str, before: Scores, after: Scores, seconds: float) -> None:
    """Adds the scores of the model that a defense returned, with its DER, and what the defense took.

    What an earlier start recorded of its seconds stays: a finished defense is loaded, and what it does again, such as
    choosing among finished candidates, takes another time in each start.
    """
    seconds = outcome['purified'].get(defense, {}).get('seconds', seconds)
    effectiveness = _number(defense_effectiveness(before, after)) if not math.isnan(before.asr) else None
    outcome['purified'][defense] = _shares(after) | {
        'der': effectiveness,
        'seconds': round(seconds, 3),
        'per_class': _per_class(after),
    }


def add_detection(outcome: dict[str, Any], defense: str, found: PoisonDetection) -> None:
    """Adds how well a defense that holds the suspect training set, and so no clean share, found the poisoned images."""
    outcome['purified'][defense] |= {
        'clean_share': 0.0,
        'poisoned_shares': list(found.poisoned_shares),
        'aucs': [_number(auc) for auc in found.aucs],
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _shares(scores: Scores) -> dict[str, Any]:
    return {
        'acc': _number(scores.acc),
        'asr': _number(scores.asr),
        'ra': _number(scores.ra),
        'cross_acc': _number(scores.cross_acc),
    }


def _per_class(scores: Scores) -> dict[str, list[float | None]]:
    arrays = {'acc': scores.acc_per_class, 'asr': scores.asr_per_class, 'ra': scores.ra_per_class}
    return {name: [_number(float(x)) for x in array] for name, array in arrays.items()}


def first_model(outcome: dict[str, Any]) -> str:
    """Returns what to call the model that all starts from: infected, benign, or suspect (trigger unknown)."""
    return {'none': 'benign', 'unknown': 'suspect'}.get(outcome['attack'], 'infected')


def featured(defenses: Iterable[str]) -> str:
    """Returns the defense that the verdict is about, chosen without a look at its scores: AFT, or the last one."""
    names = list(defenses)
    return 'aft' if 'aft' in names else names[-1]


def percent(share: float | None) -> str:
    """Returns '97.1 %' with a space that does not break, or a dash for what does not exist."""
    return '–' if share is None else f'{100 * share:.1f}\u00a0%'
