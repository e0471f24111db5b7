"""The verdict on an experiment in one sentence."""

from aft_jax.results import search_text
from aft_jax.results.record import ModelScores, Results, featured, percent

# Up to this attack success rate, the backdoor counts as erased.
ERASED = 0.05
# A larger loss of clean accuracy is mentioned.
ACC_LOSS_WORTH_MENTIONING = 0.02
# Below this attack success rate, there was hardly a backdoor to erase.
MIN_ASR = 0.5


def sentence(results: Results) -> str:
    """Writes the verdict on the featured defense, or on the first model if nothing was purified."""
    if not results.purified:
        return _unpurified(results)
    name = featured(results.purified)
    before, after, title = results.initial, results.purified[name], name.upper()
    accuracy = f'clean accuracy {_change(before.acc, after.acc)}'
    if results.kind == 'benign':
        return f'There was no backdoor to erase; under {title} {accuracy}.'
    if results.given is not None and results.given.doubt:
        return f'There is no verdict on {title}, since {results.given.doubt}.'
    if name in search_text.searches(results):
        return _searched(results, name, accuracy)
    if before.asr is None or after.asr is None:
        score = ''
        if before.scan and after.scan:
            score = f'the infection score goes from {before.scan["score"]:.2f} to {after.scan["score"]:.2f}, and '
        return f'Without the trigger it is unknown whether the backdoor is gone: under {title} {score}{accuracy}.'
    if before.asr < MIN_ASR:
        return (
            f'The attack hardly worked ({percent(before.asr)} of triggered images were classified as the target '
            f'label), so {title} had little to erase: now it is {percent(after.asr)}, and {accuracy}.'
        )
    costly = before.acc - after.acc > ACC_LOSS_WORTH_MENTIONING
    rate = (
        f'{percent(after.asr)} of triggered images are still classified as the target label '
        f'({percent(before.asr)} before)'
    )
    if after.asr <= ERASED:
        cost = ', but at a cost' if costly else ''
        return f'{title} erased the backdoor{cost}: {rate}, and {accuracy}.'
    weakened = after.asr <= before.asr / 2
    verb = 'weakened the backdoor but did not erase it' if weakened else 'did not erase the backdoor'
    return f'{title} {verb}: {rate}, and {accuracy}.'


def others(results: Results) -> str:
    """Writes what follows the verdict.

    This is the advice or the limits of a search for triggers, or else a comparison of the attack success rates under
    the other defenses.

    Returns:
        '' without a search, and without another defense or an attack.
    """
    name = featured(results.purified) if results.purified else results.first_model
    search = search_text.searches(results).get(name)
    if search is not None:
        if not search_text.found(search):
            return f'Tried: {search_text.kinds_tried(search)}. Other changes may lead to one label.'
        return search_text.ADVICE if results.purified else 'Nothing was purified yet.'
    if len(results.purified) < 2 or results.kind != 'infected':
        return ''
    shown = featured(results.purified)
    rates = [
        f'{percent(scores.asr)} under {name.upper()}' for name, scores in results.purified.items() if name != shown
    ]
    return f'For comparison, the attack success rate is {", ".join(rates)}.'


def _unpurified(results: Results) -> str:
    scores: ModelScores = results.initial
    accuracy = f'clean accuracy is {percent(scores.acc)}'
    if results.first_model in search_text.searches(results):
        return _searched(results, results.first_model, accuracy)
    if scores.scan:
        return f'Nothing was purified yet: the infection score is {scores.scan["score"]:.2f}, and {accuracy}.'
    if scores.asr is None:
        return f'Nothing was purified yet: this is the {results.first_model} model, and its {accuracy}.'
    return (
        f'Nothing was purified yet: {percent(scores.asr)} of triggered images are classified as the target label, '
        f'and {accuracy}.'
    )


def _searched(results: Results, name: str, accuracy: str) -> str:
    """Writes the verdict of the search for triggers on a model in one sentence, which ends with its accuracy."""
    search = search_text.searches(results)[name]
    purified = name in results.purified
    if not search_text.found(search):
        under = f' under {name.upper()}' if purified else ''
        return f'{_capital(search_text.nothing_found(results, name))}{under}, and {accuracy}.'
    change = search_text.clause(search['changes'][0], search_text.class_names(results))
    under = f'under {name.upper()} ' if purified else ''
    return f'{_capital(search["verdict"])}: {under}one {change}, and {accuracy}.'


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _change(before: float, after: float) -> str:
    lost = round(100 * before, 1) - round(100 * after, 1)
    if abs(lost) < 0.05:
        return f'stays at {percent(after)}'
    return f'{"falls" if lost > 0 else "rises"} from {percent(before)} to {percent(after)}'
