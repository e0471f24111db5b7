"""results.json, the contract that scripts and people read, and the table on the terminal.

Shares are in 0..1, times in seconds; a share that does not exist (ASR without an attack) is null.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from aft_jax.evaluation import Detection, Scores, defense_effectiveness

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


def add_detection(outcome: dict[str, Any], defense: str, found: Detection) -> None:
    """Adds how well a defense that holds the suspect training set, and so no clean share, found the poisoned images."""
    outcome['purified'][defense] |= {
        'clean_share': 0.0,
        'poisoned_shares': list(found.poisoned_shares),
        'aucs': [_number(auc) for auc in found.aucs],
    }


def table(outcome: dict[str, Any]) -> str:
    """Returns the table of an experiment for a terminal, shares in percent."""
    if 'suspect' in outcome:
        return _suspect_table(outcome)
    attack = f'{outcome["attack"]} ({outcome["label_mode"]})' if outcome['attack'] != 'none' else 'no attack'
    lines = [
        f'{outcome["dataset"]}, {outcome["model"]}, {attack}, seed {outcome["seed"]}, '
        f'defender holds {100 * outcome["clean_share"]:g} % clean images',
        '',
        f'{"":<12}{"ACC %":>8}{"ASR %":>8}{"RA %":>8}{"DER %":>8}{"seconds":>9}',
    ]
    first = 'infected' if outcome['attack'] != 'none' else 'benign'
    for name, row in [(first, outcome['infected']), *outcome['purified'].items()]:
        shares = ''.join(f'{_percent(row.get(share)):>8}' for share in ('acc', 'asr', 'ra', 'der'))
        lines.append(f'{name:<12}{shares}{row["seconds"]:>9.1f}')
    lines += ['', "ACC clean accuracy; ASR triggered images that get the attacker's label; RA those that get their own"]
    return '\n'.join(lines)


UNKNOWN = """
What cannot be known without the trigger: whether this model had a backdoor at all (a high score speaks for one, a low
score does not rule one out), how often its trigger worked (ASR), and whether it still works after the purification.
Score: near 0 for most benign models, near the trigger's success where one change of all images commands a label.
"""


def _suspect_table(outcome: dict[str, Any]) -> str:
    """The table of a model whose trigger nobody knows: no ASR, RA or DER."""
    suspect = outcome['suspect']
    rows = {'suspect': suspect} | outcome['purified']
    scanned = 'scan' in suspect
    heading = f'{"":<12}{"ACC %":>8}' + (f'{"score":>8}{"fooled %":>10}{"suspected":>16}' if scanned else '')
    purified = bool(outcome['purified'])
    lines = [
        f'{suspect["init_from"]} ({outcome["model"]}), {outcome["dataset"]}, seed {outcome["seed"]}: trigger unknown',
        '',
        heading + (f'{"seconds":>9}' if purified else ''),
    ]
    for name, row in rows.items():
        line = f'{name:<12}{_percent(row["acc"]):>8}'
        if scanned:
            line += _scan_cells(row.get('scan'), suspect['class_names'])
        lines.append(line + (f'{row["seconds"]:>9.1f}' if 'seconds' in row else ''))
    lines += ['', 'ACC clean accuracy on the images held out']
    if scanned:
        images = suspect['scan']['images']
        which = 'held out' if suspect['scan']['held_out'] else 'given, those of the purification among them'
        lines += [
            f'score of infection, from {images} images {which}; fooled by changes of {round(255 * SHOWN_EPS)}/255 a '
            'pixel;',
            'suspected: the label that a backdoor would command, if there is one (at a score near 0 it says nothing)',
        ]
    if suspect['warning']:
        lines += ['', f'Warning: {suspect["warning"]}']
    return '\n'.join(lines) + '\n' + UNKNOWN.rstrip()


def _scan_cells(scan: dict[str, Any] | None, class_names: list[str]) -> str:
    if scan is None:
        return f'{"-":>8}{"-":>10}{"-":>16}'
    label = scan['suspected_label']
    suspected = 'one a class' if label is None else class_names[label]
    fooled = scan['fooled'][scan['landing_eps'].index(SHOWN_EPS)]
    return f'{scan["score"]:>8.3f}{_percent(fooled):>10}{suspected[:14]:>16}'


def _percent(share: float | None) -> str:
    return '-' if share is None else f'{100 * share:.1f}'


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
