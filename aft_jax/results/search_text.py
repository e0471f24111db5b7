"""Says what the search for triggers has found, from a scan's fields in results.json."""

from collections.abc import Sequence
from typing import Any

from aft_jax.results.record import Results, featured, percent

# Changes that a text lists for one model.
SHOWN_CHANGES = 3
KIND_NAMES = {
    'linf': 'pattern over the whole image (Linf)',
    'l2': 'pattern over the whole image (L2)',
    'low_frequency': 'smooth pattern',
    'rectangle': 'rectangle',
    'region': 'region',
    'mask': 'mask with a pattern',
    'tone': 'change of colours',
    'blur': 'blur or sharpening',
    'warp': 'distortion',
    'affine': 'shift, rotation or scaling',
}
ADVICE = (
    'Do not rely on this model: purify it with another seed, another defense or more clean images, or train a new one '
    'on data that you trust.'
)


def verdict_line(results: Results) -> str:
    """Writes the verdict of the search in one line: that on the featured defense, or else on the first model.

    Returns:
        '' if the models were not searched.
    """
    name = featured(results.purified) if results.purified else results.first_model
    scan = (results.purified[name] if results.purified else results.initial).scan
    search = scan.get('search') if scan else None
    if search is None:
        return ''
    class_names = results.given.class_names if results.given is not None else ()
    purified = bool(results.purified)
    if search['verdict'] == 'nothing found':
        kinds = ', '.join(KIND_NAMES[change['kind']] for change in search['changes'])
        still = ' any more' if purified else ''
        return (
            f'Verdict on {name}: no change of these kinds leads to one label{still}: {kinds}. Other changes may. '
            f'Sizes: up to {search["factor"]:g} times those that AFT trains with.'
        )
    found = describe(search['changes'][0], class_names)
    return f'Verdict on {name}: {search["verdict"]}. {found}' + (f' {ADVICE}' if purified else '')


def describe(change: dict[str, Any], class_names: Sequence[str]) -> str:
    """Describes a found change in one sentence.

    Args:
        change: Element of 'changes' of a search.
        class_names: Names of the K classes; empty to write the number of a label.
    """
    label = change['label']
    if label is None:
        moves = 'moves images of each class to another class'
    else:
        moves = f'leads to the label {class_names[label] if class_names else label!r}'
    return (
        f'One {KIND_NAMES[change["kind"]]}, equal on all images, {moves} in {percent(change["share"])} of the images '
        f'({percent(change["reference_share"])} under the reference model).'
    )


def found_lines(results: Results) -> list[str]:
    """Lists the changes with the largest excess of each searched model, for the terminal."""
    lines = []
    for name, scores in results.models.items():
        search = scores.scan.get('search') if scores.scan else None
        if search is None:
            continue
        shown = ', '.join(map(_short, search['changes'][:SHOWN_CHANGES]))
        lines.append(f'{name:<12}{search["verdict"]:<15} {shown}')
    return lines


def _short(change: dict[str, Any]) -> str:
    label = 'one label a class' if change['label'] is None else change['label']
    return f'{change["kind"]} {percent(change["share"])} to {label} ({percent(change["reference_share"])})'
