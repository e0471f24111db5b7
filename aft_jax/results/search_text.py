"""Says what the search for triggers has found, from a scan's fields in results.json."""

from collections.abc import Sequence
from typing import Any

from aft_jax.results.record import Results, featured, percent

# Changes that a text lists for one model.
SHOWN_CHANGES = 3
# The same as in analysis.backdoor_scan, which is a higher layer.
NOTHING_FOUND = 'nothing found'
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


def searches(results: Results) -> dict[str, dict[str, Any]]:
    """Collects the fields 'search' of the models that were searched, by model, the first model first."""
    scans = {name: scores.scan for name, scores in results.models.items() if scores.scan}
    return {name: scan['search'] for name, scan in scans.items() if 'search' in scan}


def judged_model(results: Results) -> str | None:
    """Chooses the model that the verdict is about: the featured one of the searched defenses, or the first model.

    Returns:
        None if no model was searched.
    """
    searched = searches(results)
    defenses = [name for name in searched if name in results.purified]
    if defenses:
        return featured(defenses)
    return next(iter(searched), None)


def verdict_line(results: Results) -> str:
    """Writes the verdict of the search in one line: that on `judged_model`.

    Returns:
        '' if no model was searched.
    """
    name = judged_model(results)
    if name is None:
        return ''
    if results.given is not None and results.given.doubt and name in results.purified:
        return f'No verdict on {name}, since {results.given.doubt}.'
    return f'Verdict on {name}: {verdict(results, name)}'


def verdict(results: Results, name: str) -> str:
    """Writes the verdict on a searched model, without its name."""
    search = searches(results)[name]
    if not found(search):
        return f'{nothing_found(results, name)}: {kinds_tried(search)}. Other changes may.'
    advice = f' {ADVICE}' if name in results.purified else ''
    return f'{search["verdict"]}. {describe(search["changes"][0], class_names(results))}{advice}'


def found(search: dict[str, Any]) -> bool:
    """Checks whether a search has found a change that leads to one label, and not under the reference model."""
    return search['verdict'] != NOTHING_FOUND


def nothing_found(results: Results, name: str) -> str:
    """Writes that no change leads to one label, or none any more, as the beginning of a sentence."""
    before = searches(results).get(results.first_model)
    still = ' any more' if name in results.purified and before is not None and found(before) else ''
    return f'no change of these kinds leads to one label{still}'


def kinds_tried(search: dict[str, Any]) -> str:
    """Lists the kinds of changes that a search has tried, and their sizes."""
    kinds = ', '.join(KIND_NAMES[change['kind']] for change in search['changes'])
    return f'{kinds}; of {search["factor"]:g} times the largest size that AFT trains with'


def class_names(results: Results) -> tuple[str, ...]:
    """Returns the names of the classes; () if the results do not have them."""
    return results.given.class_names if results.given is not None else ()


def describe(change: dict[str, Any], class_names: Sequence[str]) -> str:
    """Describes a found change in one sentence.

    Args:
        change: Element of 'changes' of a search.
        class_names: Names of the K classes; empty to write the number of a label.
    """
    return f'One {clause(change, class_names)}.'


def clause(change: dict[str, Any], class_names: Sequence[str]) -> str:
    """Describes a found change like `describe`, without the first word and the full stop."""
    if change['label'] is None:
        moves = 'moves images of each class to another class'
    else:
        moves = f'leads to the label {label_name(change, class_names)}'
    return (
        f'{KIND_NAMES[change["kind"]]}, equal on all images, {moves} in {percent(change["share"])} of the images '
        f'({percent(change["reference_share"])} under the reference model)'
    )


def label_name(change: dict[str, Any], class_names: Sequence[str]) -> str:
    """Names the label that a found change leads to. Arguments as those of `describe`."""
    label = change['label']
    if label is None:
        return 'one label a class'
    return class_names[label] if class_names else str(label)


def found_lines(results: Results) -> list[str]:
    """Lists the changes with the largest excess of each searched model, for the terminal."""
    names = class_names(results)
    return [
        f'{name:<12}{search["verdict"]:<15} {", ".join(_short(c, names) for c in search["changes"][:SHOWN_CHANGES])}'
        for name, search in searches(results).items()
    ]


def _short(change: dict[str, Any], names: Sequence[str]) -> str:
    shares = f'{percent(change["share"])} to {label_name(change, names)} ({percent(change["reference_share"])})'
    return f'{change["kind"]} {shares}'
