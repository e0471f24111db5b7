"""The table of scans of many models, and how often their verdicts are right."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aft_jax.analysis.backdoor_scan import Scan, limit_of
from aft_jax.config import UNPURIFIED
from aft_jax.evaluation.roc import auc
from aft_jax.pipeline.saved_run import SavedRun
from aft_jax.results.record import ModelScores

MODEL_COLUMNS = ('run', 'dataset', 'model', 'attack', 'label_mode', 'seed', 'defense', 'acc', 'asr', 'target')
COLUMNS = (*MODEL_COLUMNS, 'kind', 'backdoor', 'label', 'excess', 'share', 'reference_share')
# An infected model counts above the first ASR, a purified one as not erased above the second.
STRONG_ASR, LEFT_ASR = 0.8, 0.2


def rows_of(run: SavedRun, defense: str, scan: Scan, scores: ModelScores) -> list[dict[str, Any]]:
    """Converts the scan of a model to rows, one for each kind of change.

    Args:
        run: Run of the model.
        defense: Defense that purified it, or UNPURIFIED.
        scan: Its scan.
        scores: Its scores.
    """
    attack = run.infected.attack
    all2one = run.config.attack.label_mode == 'all2one'
    model = run.names | {
        'defense': defense,
        'acc': scores.acc,
        'asr': scores.asr,
        'target': int(attack.target_map[0]) if attack is not None and all2one else None,
    }
    return [
        model | {name: change[name] for name in COLUMNS if name in change}
        for change in scan.fields['search']['changes']
    ]


class ScannedModel(NamedTuple):
    """A scanned model, as the rows of the table have it.

    Attributes:
        run: Name of its run.
        defense: Defense that purified it, or UNPURIFIED.
        asr: Attack success rate; None for a benign model.
        target: Target label; None without an all2one backdoor.
        changes: Excess of the best change of each kind, and the label that it leads to (None for all2all), by kind.
    """

    run: str
    defense: str
    asr: float | None
    target: int | None
    changes: dict[str, tuple[float, int | None]]

    @property
    def purified(self) -> bool:
        """Whether the model was purified."""
        return self.defense != UNPURIFIED

    @property
    def counts_as(self) -> bool | None:
        """Whether the model has a backdoor. None for an infected model below STRONG_ASR, which does not count."""
        if self.asr is None:
            return False
        if self.purified:
            return self.asr > LEFT_ASR
        return True if self.asr >= STRONG_ASR else None

    @property
    def furthest(self) -> tuple[float, int | None]:
        """How far the strongest change is above its limit, and its label. Above 0 the verdict is a backdoor."""
        ranked = [(excess - limit_of(kind, self.purified), kind) for kind, (excess, _) in self.changes.items()]
        margin, kind = max(ranked)
        return margin, self.changes[kind][1]


def scanned_models(rows: Iterable[Mapping[str, Any]]) -> list[ScannedModel]:
    """Collects the rows of each model."""
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        grouped[row['run'], row['defense']].append(row)
    return [
        ScannedModel(*name, found[0]['asr'], found[0]['target'], {r['kind']: (r['excess'], r['label']) for r in found})
        for name, found in grouped.items()
    ]


def summary(models: Sequence[ScannedModel]) -> str:
    """Says how often the verdict is right before and after purification, with the AUC of its margin."""
    lines = []
    for purified, name in ((False, 'before purification'), (True, 'purified')):
        chosen = [model for model in models if model.purified == purified]
        positives = [model for model in chosen if model.counts_as]
        negatives = [model for model in chosen if model.asr is None]
        erased = [model for model in chosen if model.asr is not None and model.counts_as is False]
        if not chosen:
            continue
        bar = f'ASR above {LEFT_ASR:.0%}' if purified else f'ASR at least {STRONG_ASR:.0%}'
        lines.append(f'{name}: a backdoor is found in {_found(positives)} models with an {bar},')
        if erased:
            lines.append(f'  in {_found(erased)} with an ASR of at most {LEFT_ASR:.0%},')
        area = auc(*(np.array([model.furthest[0] for model in group]) for group in (positives, negatives)))
        lines.append(f'  and in {_found(negatives)} benign ones. AUC {area:.3f}')
        if not purified:
            one = [model for model in positives if model.target is not None and model.furthest[0] > 0]
            right = sum(model.furthest[1] == model.target for model in one)
            lines.append(f'  The label is right for {right} of {len(one)} found all-to-one backdoors.')
    return '\n'.join(lines)


def _found(models: Sequence[ScannedModel]) -> str:
    return f'{sum(model.furthest[0] > 0 for model in models)} of {len(models)}'
