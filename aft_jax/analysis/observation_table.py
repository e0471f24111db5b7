"""The observation and the infection score of many finished runs, as the rows of a table."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from aft_jax.adversarial.pgd import Norm
from aft_jax.analysis.connection import Measured, Shown, evaluate
from aft_jax.analysis.infection_score import Scorer
from aft_jax.analysis.probe import Probe
from aft_jax.attacks.attack import triggered
from aft_jax.errors import UserError
from aft_jax.evaluation.roc import auc
from aft_jax.pipeline import saved_run
from aft_jax.pipeline.saved_run import SavedRun
from aft_jax.runtime.sharding import make_mesh

MEASURES = (
    *('target_share', 'feature_distance', 'feature_distance_benign_examples'),
    *(f'neuron_{name}{whose}' for whose in ('', '_benign_examples') for name in ('top_5', 'top_10', 'correlation')),
)
COLUMNS = (
    *('run', 'dataset', 'model', 'attack', 'label_mode', 'seed', 'defense', 'control', 'measured', 'norm', 'eps'),
    *('images', 'fooled'),
    *(f'{name}{end}' for name in MEASURES for end in ('', '_low', '_high')),
    *('score', 'kind', 'suspected', 'correct', 'crowding', 'crowding_kind'),
)


def measure(
    runs: Sequence[Path],
    benign: Sequence[Path],
    norms: Sequence[Norm],
    eps: Sequence[float],
    count: int,
    defenses: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields the rows of the table, run by run.

    Args:
        runs: Work directories of finished runs.
        benign: Those of the controls.
        norms: Of the adversarial changes.
        eps: Their sizes, in 1/255.
        count: How many images are used.
        defenses: Whose models are measured beside the infected ones; None for all.

    Raises:
        UserError: A run cannot be read back, or no control is of its kind.
    """
    mesh, datasets = make_mesh(), saved_run.Datasets()
    controls = [saved_run.load(path, mesh, datasets, defenses=()) for path in benign]
    for control in controls:
        if control.infected.attack is not None:
            raise UserError(f'--benign={control.directory} is a run with an attack; name one with attack.name=none.')
    for directory in runs:
        run = saved_run.load(directory, mesh, datasets, defenses)
        probe, scorer = tools_for(run.scenario.module, mesh, min(run.config.run.eval_batch_size, count))
        benign_variables = control_of(run, controls)
        shared = {
            'run': run.directory.name,
            'dataset': run.config.dataset,
            'model': run.config.model.name,
            'attack': run.config.attack.name,
            'label_mode': run.config.attack.label_mode,
            'seed': run.config.seed,
        }
        for defense, variables in {'none': run.infected.variables, **run.purified}.items():
            yield shared | {'defense': defense} | score_row(run, variables, scorer, eps, count)
            for row in observation_rows(run, variables, benign_variables, probe, norms, eps, count):
                # The control is the same for every model of the run.
                if defense == 'none' or 'control' not in row:
                    yield shared | {'defense': defense} | row


@functools.lru_cache(maxsize=1)
def tools_for(module: nn.Module, mesh: Mesh, batch_size: int) -> tuple[Probe, Scorer]:
    """Returns what measures models of one architecture, compiled once for runs that follow each other."""
    probe = Probe(module, mesh, batch_size)
    return probe, Scorer(probe, module, mesh, batch_size)


def control_of(run: SavedRun, controls: Sequence[SavedRun]) -> dict | None:
    """Returns the variables of the benign model to compare a run with, of its own seed where there is one.

    Raises:
        UserError: Controls were given, but none is of the same data and model.
    """

    def kind(one: SavedRun) -> tuple:
        return one.config.dataset, one.config.data, one.config.model, one.config.dtype

    fitting = [control for control in controls if kind(control) == kind(run)]
    if controls and not fitting:
        raise UserError(f'--benign has no run of the data and the model of {run.directory}; name one.')
    fitting.sort(key=lambda control: control.config.seed != run.config.seed)
    return fitting[0].infected.variables if fitting else None


def observation_rows(
    run: SavedRun,
    variables: dict,
    control: dict | None,
    probe: Probe,
    norms: Sequence[Norm],
    eps: Sequence[float],
    count: int,
) -> Iterator[dict[str, Any]]:
    """Yields the three measurements of one model, and of the control in its place, by norm and eps.

    Nothing for a run without an attack, which has no trigger.
    """
    attack, dataset = run.infected.attack, run.scenario.dataset
    if attack is None:
        return
    chosen = evenly(len(dataset.test_labels), count)
    clean, labels = dataset.test_images[chosen], dataset.test_labels[chosen]
    shown = Shown(clean, triggered(attack, clean), labels, attack.target_map)
    counted = shown.counted
    for norm in norms:
        for size in eps:
            where = {'measured': 'connection', 'norm': norm, 'eps': f'{size:g}/255', 'images': len(counted.labels)}
            own = probe.adversarial(variables, counted.clean, counted.labels, norm, size / 255)
            row = where | columns(evaluate(probe, variables, own, shown))
            if control is not None:
                theirs = probe.adversarial(control, counted.clean, counted.labels, norm, size / 255)
                seen = columns(evaluate(probe, variables, theirs, shown), '_benign_examples')
                row |= {name: value for name, value in seen.items() if name in COLUMNS}
                yield where | {'control': 'benign'} | columns(evaluate(probe, control, theirs, shown))
            yield row


def columns(measured: Measured, whose: str = '') -> dict[str, Any]:
    """Returns what was measured by column; `whose` goes after the measurements' names."""
    estimates = {
        f'target_share{whose}': measured.target_share,
        f'feature_distance{whose}': measured.feature_distance,
        **{f'neuron_{name}{whose}': value for name, value in measured.neuron_overlap._asdict().items()},
    }
    row: dict[str, Any] = {f'fooled{whose}': measured.fooled}
    for name, estimate in estimates.items():
        row |= {name: estimate.value, f'{name}_low': estimate.low, f'{name}_high': estimate.high}
    return row


def score_row(run: SavedRun, variables: dict, scorer: Scorer, eps: Sequence[float], count: int) -> dict[str, Any]:
    """Returns the infection score of one model, from the defender's clean images."""
    dataset, attack = run.scenario.dataset, run.infected.attack
    chosen = run.scenario.clean[evenly(len(run.scenario.clean), count)]
    images, labels = dataset.train_images[chosen], dataset.train_labels[chosen]
    found = scorer(variables, images, labels, dataset.num_classes, tuple(size / 255 for size in eps))
    row = {
        'measured': 'score',
        'images': len(chosen),
        'score': found.hypothesis.score,
        'kind': found.hypothesis.kind,
        'suspected': ' '.join(map(str, found.hypothesis.target_map)),
        'crowding': found.crowding.score,
        'crowding_kind': found.crowding.kind,
    }
    if attack is not None:
        row['correct'] = float((found.hypothesis.target_map == attack.target_map).mean())
    return row


def evenly(size: int, count: int) -> np.ndarray:
    """Returns `count` indices, or all, evenly over `size`: stored images may be in the order of their classes."""
    return np.linspace(0, size - 1, min(size, count)).round().astype(np.int64)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the scores of all models, and how well they tell infected models from benign ones."""
    scored = [row for row in rows if row['measured'] == 'score']
    lines = [f'{"":<28}{"defense":<10}{"score":>7}  {"kind":<8} suspected']
    lines += [f'{r["run"]:<28}{r["defense"]:<10}{r["score"]:>7.3f}  {r["kind"]:<8} {r["suspected"]}' for r in scored]
    before = [row for row in scored if row['defense'] == 'none']
    for name in ('score', 'crowding'):
        infected = np.array([row[name] for row in before if row['attack'] != 'none'])
        benign = np.array([row[name] for row in before if row['attack'] == 'none'])
        if len(infected) and len(benign):
            told = f'{auc(infected, benign):.3f} ({len(infected)} infected, {len(benign)} benign models)'
            lines.append(f'ROC AUC of the {name}: {told}')
    return '\n'.join(lines)
