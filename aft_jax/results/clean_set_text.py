"""Says what is wrong with the clean images of a given model, and what follows from it."""

from aft_jax.results.record import Results

# Indices that a text lists.
SHOWN_INDICES = 20


def withheld_lines(results: Results) -> list[str]:
    """Says which purified models are not exported, and why."""
    return [
        f'{name} is not exported, since {reason}; --config.safety.export_anyway=True exports it.'
        for name, reason in results.withheld.items()
    ]


def tainted_lines(results: Results) -> list[str]:
    """Says which images look tainted and were left out; empty if there are none."""
    left = {part: indices for part, indices in (results.given.tainted if results.given else {}).items() if indices}
    if not left:
        return []
    count = sum(map(len, left.values()))
    return [
        f'{count} clean images look tainted, as if they carried a trigger, and were left out. The suspect predicts '
        'their labels, and a reference model, trained on the others, predicts different ones.',
        *(f'Images for the {part} (from 0): {_listed(indices)}' for part, indices in left.items()),
    ]


def _listed(indices: list[int]) -> str:
    shown = ', '.join(map(str, indices[:SHOWN_INDICES]))
    return f'{shown}, and {len(indices) - SHOWN_INDICES} more' if len(indices) > SHOWN_INDICES else shown
