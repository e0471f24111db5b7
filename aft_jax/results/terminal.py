"""Formats the results of an experiment as a table for the terminal."""

from typing import Any

from aft_jax.results import clean_set_text, search_text
from aft_jax.results.record import SHOWN_EPS, Results

PROVISIONAL = 'The limits of the verdict come from two benign models so far, so false alarms are likely on other data.'
UNKNOWN = """
What cannot be known without the trigger: whether the model had a backdoor, how often the trigger worked (ASR), and
whether it still does. A high score is evidence of a backdoor, but a low score does not rule one out. After a
purification a score near 0 does not show that the backdoor is gone: small local triggers have survived it.
Score: near 0 for most benign models, near the ASR if one perturbation of all images leads to the target label.
"""


def table(results: Results) -> str:
    """Formats the results of an experiment, with shares in percent."""
    if results.kind == 'given':
        return _given_table(results)
    setting = results.setting
    attack = 'no attack' if results.kind == 'benign' else f'{setting.attack} ({setting.label_mode})'
    lines = [
        f'{setting.dataset}, {setting.model}, {attack}, seed {setting.seed}, '
        f'defender holds {100 * setting.clean_share:g} % clean images',
        '',
        f'{"":<12}{"ACC %":>8}{"ASR %":>8}{"RA %":>8}{"DER %":>8}{"seconds":>9}',
    ]
    for name, scores in results.models.items():
        shares = ''.join(f'{_percent(scores.share(share)):>8}' for share in ('acc', 'asr', 'ra', 'der'))
        lines.append(f'{name:<12}{shares}{scores.seconds:>9.1f}')
    lines += [
        '',
        'ACC: clean images classified correctly; RA: triggered images classified correctly;',
        'ASR: triggered images classified as the target label',
    ]
    return '\n'.join(lines + _search_lines(results))


def _given_table(results: Results) -> str:
    """Formats the results of a given model. Its trigger is unknown, so there is no ASR, RA or DER."""
    given = results.given
    assert given is not None
    scan = results.initial.scan
    heading = f'{"":<12}{"ACC %":>8}' + (f'{"score":>8}{"fooled %":>10}{"suspected":>16}' if scan else '')
    setting = results.setting
    lines = [
        f'{given.init_from} ({setting.model}), {setting.dataset}, seed {setting.seed}: trigger unknown',
        '',
        heading + (f'{"seconds":>9}' if results.purified else ''),
    ]
    for name, scores in results.models.items():
        line = f'{name:<12}{_percent(scores.acc):>8}'
        if scan:
            line += _scan_cells(scores.scan, given.class_names)
        lines.append(line + ('' if scores.seconds is None else f'{scores.seconds:>9.1f}'))
    lines += ['', 'ACC: held-out clean images classified correctly']
    if scan:
        images = 'held-out images' if scan['held_out'] else 'images, the training images of the defenses among them'
        lines += [
            f'score: infection score, from {scan["images"]} clean {images}',
            f'fooled: adversarial examples of size {round(255 * SHOWN_EPS)}/255 that change the prediction',
            'suspected: target label of the backdoor, if there is one; meaningless at a score near 0',
        ]
    if given.warning:
        lines += ['', f'Warning: {given.warning}']
    for more in (clean_set_text.tainted_lines(results), clean_set_text.withheld_lines(results)):
        lines += ['', *more] if more else []
    return '\n'.join([*lines, UNKNOWN.rstrip(), *_search_lines(results)])


def _search_lines(results: Results) -> list[str]:
    """Formats what the search for triggers found, with the verdict as the last line; empty without a search."""
    found = search_text.found_lines(results)
    if not found:
        return []
    heading = 'Changes found by the search: share of the images that go to a label (under the reference model)'
    return ['', heading, *found, '', PROVISIONAL, search_text.verdict_line(results)]


def _scan_cells(scan: dict[str, Any] | None, class_names: tuple[str, ...]) -> str:
    if scan is None:
        return f'{"-":>8}{"-":>10}{"-":>16}'
    label = scan['suspected_label']
    suspected = 'one a class' if label is None else class_names[label]
    fooled = scan['fooled'][scan['landing_eps'].index(SHOWN_EPS)]
    return f'{scan["score"]:>8.3f}{_percent(fooled):>10}{suspected[:14]:>16}'


def _percent(share: float | None) -> str:
    """Formats a share without a unit, which the heading has."""
    return '-' if share is None else f'{100 * share:.1f}'
