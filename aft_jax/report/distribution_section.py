"""The section of a table's page about random triggers: the distribution of the ASR that each defense leaves."""

from collections.abc import Sequence
from typing import Any

from aft_jax.report import distribution_figure
from aft_jax.report.verdict import ERASED
from aft_jax.results.distribution import ALL, COUNTED_ASR, HEADINGS, Distribution, cells, counts, share_above
from aft_jax.results.record import featured, percent


def content(distributions: Sequence[Distribution]) -> dict[str, Any] | None:
    """Collects the content of the section; None without random triggers."""
    if not distributions:
        return None
    counted, not_counted = counts(distributions)
    return {
        'counted': counted,
        'models': counted + not_counted,
        'threshold': f'{100 * COUNTED_ASR:g}',
        'columns': {name: title.removesuffix(' %') if '>' not in title else title for name, title in HEADINGS.items()},
        'families': {
            family.replace('_', '-'): [
                {'name': d.name, 'first': d.unpurified, 'cells': cells(d)} for d in distributions if d.family == family
            ]
            for family in dict.fromkeys(d.family for d in distributions)
        },
        'panel': distribution_figure.draw(None, distributions),
    }


def sentence(distributions: Sequence[Distribution]) -> str:
    """Writes what the featured defense leaves on all triggers together in one sentence."""
    purified = [d for d in distributions if d.family == ALL and d.rates and not d.unpurified]
    if not purified:
        counted, not_counted = counts(distributions)
        return f'{counted} of {counted + not_counted} models with random triggers count.'
    name = featured(d.case['defense'] for d in purified)
    chosen = next(d for d in purified if d.case['defense'] == name)
    lost = 100 * chosen.scores['acc_lost_mean']
    return (
        f'Under {chosen.name.upper()}, {percent(share_above(chosen.rates, ERASED))} of {len(chosen.rates)} models with '
        f'random triggers keep an ASR above {100 * ERASED:g}\u00a0% (median {percent(chosen.scores["asr_median"])}, '
        f'worst {percent(chosen.scores["asr_max"])}), and clean accuracy {"falls" if lost >= 0 else "rises"} by '
        f'{abs(lost):.1f} points on average.'
    )
