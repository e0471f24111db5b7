"""The verdict on an experiment in one sentence, from what results.json holds."""

from typing import Any

from aft_jax.results.record import featured, first_model, percent

# An attack success rate up to this counts as erased; clean accuracy lost beyond the other is called a price.
ERASED, ACC_LOSS_WORTH_MENTIONING = 0.05, 0.02
# Below this success rate there was hardly a backdoor to erase.
MIN_ASR = 0.5


def sentence(outcome: dict[str, Any]) -> str:
    """Returns the verdict."""
    before, first = outcome['infected'], first_model(outcome)
    if not outcome['purified']:
        return _alone(before, first)
    name = featured(outcome['purified'])
    after, title = outcome['purified'][name], name.upper()
    accuracy = f'clean accuracy {_change(before["acc"], after["acc"])}'
    if first == 'benign':
        return f'There was no backdoor to erase; under {title} {accuracy}.'
    scans = before.get('scan'), after.get('scan')
    if first == 'suspect' and all(scans):
        scores = ' to '.join(f'{scan["score"]:.2f}' for scan in scans)
        return (
            f'Whether the backdoor is gone cannot be told without its trigger: under {title} the score of infection '
            f'goes from {scores}, and {accuracy}.'
        )
    if before.get('asr') is None or after.get('asr') is None:
        return f'Whether the backdoor is gone cannot be told without its trigger: under {title} {accuracy}.'
    if before['asr'] < MIN_ASR:
        return (
            f'The attack hardly took ({percent(before["asr"])} of triggered images obeyed), so {title} had little to '
            f'erase: now {percent(after["asr"])} obey, and {accuracy}.'
        )
    costly = before['acc'] - after['acc'] > ACC_LOSS_WORTH_MENTIONING
    obeying = f'{percent(after["asr"])} of triggered images still obey the attacker ({percent(before["asr"])} before)'
    if after['asr'] <= ERASED:
        price = ', but at a price' if costly else ''
        return f'{title} erased the backdoor{price}: {obeying}, and {accuracy}.'
    weakened = after['asr'] <= before['asr'] / 2
    verb = 'weakened the backdoor but did not erase it' if weakened else 'did not erase the backdoor'
    return f'{title} {verb}: {obeying}, and {accuracy}.'


def others(outcome: dict[str, Any]) -> str:
    """Returns what became of the backdoor under the other defenses, or '' where there is none to tell of."""
    rates = {name: row.get('asr') for name, row in outcome['purified'].items()}
    if len(rates) < 2 or first_model(outcome) != 'infected':
        return ''
    shown = featured(rates)
    told = [f'{name.upper()} leaves {percent(rate)}' for name, rate in rates.items() if name != shown]
    return f'For comparison, {", ".join(told)} of triggered images obeying.'


def _alone(before: dict[str, Any], first: str) -> str:
    accuracy = f'clean accuracy is {percent(before["acc"])}'
    if scan := before.get('scan'):
        return f'Nothing was purified yet: the score of infection is {scan["score"]:.2f}, and {accuracy}.'
    if before.get('asr') is None:
        return f'Nothing was purified yet: the {first} model stands as it came, and its {accuracy}.'
    return f'Nothing was purified yet: {percent(before["asr"])} of triggered images obey the attacker, and {accuracy}.'


def _change(before: float, after: float) -> str:
    lost = round(100 * before, 1) - round(100 * after, 1)
    if abs(lost) < 0.05:
        return f'stays at {percent(after)}'
    return f'{"falls" if lost > 0 else "rises"} from {percent(before)} to {percent(after)}'
