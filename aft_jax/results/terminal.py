"""Formats the results of an experiment as a table for the terminal."""

from typing import Any

from aft_jax.results.record import SHOWN_EPS

UNKNOWN = """
What cannot be known without the trigger: whether this model had a backdoor at all (a high score speaks for one, a low
score does not rule one out), how often its trigger worked (ASR), and whether it still works after the purification.
Score: near 0 for most benign models, near the trigger's success where one change of all images commands a label.
"""


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
