"""Measures the observation and the infection score of many finished runs, as the rows of a table."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from jax.sharding import Mesh

from aft_jax.adversarial.pgd import Norm
from aft_jax.analysis.connection import Measured, MeasuredImages, evaluate, evenly
from aft_jax.analysis.infection_score import Scorer
from aft_jax.analysis.probe import ModelProbe
from aft_jax.attacks.attack import triggered
from aft_jax.config import BENIGN, UNPURIFIED
from aft_jax.errors import UserError
from aft_jax.evaluation.roc import auc
from aft_jax.pipeline import saved_run
from aft_jax.pipeline.saved_run import SavedRun
from aft_jax.runtime import numerics
from aft_jax.runtime.sharding import make_mesh

MEASURES = (
    *('target_share', 'feature_distance', 'feature_distance_benign_examples'),
    *(f'neuron_{name}{suffix}' for suffix in ('', '_benign_examples') for name in ('top_5', 'top_10', 'correlation')),
)
COLUMNS = (
    *('run', 'dataset', 'model', 'attack', 'label_mode', 'seed', 'defense', 'control', 'measured', 'norm', 'eps'),
    *('images', 'fooled'),
    *(f'{name}{end}' for name in MEASURES for end in ('', '_low', '_high')),
    *('score', 'kind', 'suspected', 'correct', 'crowding', 'crowding_kind'),
)


class Tools(NamedTuple):
    """Compiled functions that measure models of one architecture.

    Attributes:
        module: Architecture.
        batch_size: Images per call.
        probe: Functions for the observation.
        scorer: Functions for the infection score.
    """

    module: nn.Module
    batch_size: int
    probe: ModelProbe
    scorer: Scorer


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
        benign: Work directories of benign runs, the controls.
        norms: Norms of the adversarial perturbations.
        eps: Sizes of the perturbations, in 1/255.
        count: Number of images.
        defenses: Defenses whose purified models are measured too; None for all.

    Raises:
        UserError: A run cannot be read back, or no control has its data and model.
    """
    numerics.pin()
    mesh, datasets = make_mesh(), saved_run.Datasets()
    controls = [saved_run.load(path, mesh, datasets, defenses=()) for path in benign]
    for control in controls:
        if control.infected.attack is not None:
            raise UserError(f'--benign={control.directory} is a run with an attack; name one with attack.name=none.')
    tools = None
    for directory in runs:
        run = saved_run.load(directory, mesh, datasets, defenses)
        tools = tools_for(run.scenario.module, mesh, min(run.config.run.eval_batch_size, count), tools)
        benign_variables = control_of(run, controls)
        for defense, variables in {UNPURIFIED: run.infected.variables, **run.purified}.items():
            yield run.names | {'defense': defense} | score_row(run, variables, tools.scorer, eps, count)
            measured = observation_rows(
                run, variables, benign_variables, tools.probe, norms=norms, eps=eps, count=count
            )
            for row in measured:
                # The control is the same for every model of the run.
                if defense == UNPURIFIED or 'control' not in row:
                    yield run.names | {'defense': defense} | row


def tools_for(module: nn.Module, mesh: Mesh, batch_size: int, last: Tools | None) -> Tools:
    """Creates the tools for an architecture; the last ones are used again if they fit, so that nothing recompiles."""
    if last is not None and (last.module, last.batch_size) == (module, batch_size):
        return last
    probe = ModelProbe(module, mesh, batch_size)
    return Tools(module, batch_size, probe, Scorer(probe, module, mesh, batch_size))


def control_of(run: SavedRun, controls: Sequence[SavedRun]) -> dict | None:
    """Chooses the benign model to compare a run with, preferably with the same seed, and returns its variables.

    Raises:
        UserError: There are controls, but none has the same data and model.
    """

    def kind(saved: SavedRun) -> tuple:
        return saved.config.dataset, saved.config.data, saved.config.model, saved.config.dtype

    comparable = [control for control in controls if kind(control) == kind(run)]
    if controls and not comparable:
        raise UserError(f'--benign has no run of the data and the model of {run.directory}; name one.')
    comparable.sort(key=lambda control: control.config.seed != run.config.seed)
    return comparable[0].infected.variables if comparable else None


def observation_rows(
    run: SavedRun,
    variables: dict,
    control: dict | None,
    probe: ModelProbe,
    *,
    norms: Sequence[Norm],
    eps: Sequence[float],
    count: int,
) -> Iterator[dict[str, Any]]:
    """Yields the three measurements of one model, and those of the benign control, by norm and eps.

    A run without an attack has no trigger, and so no rows.

    Args:
        run: Run of the model.
        variables: Variables of the model.
        control: Variables of the benign model, or None.
        probe: Compiled functions for the architecture.
        norms: Norms of the adversarial perturbations.
        eps: Sizes of the perturbations, in 1/255.
        count: Number of test images.
    """
    attack, dataset = run.infected.attack, run.scenario.dataset
    if attack is None:
        return
    chosen = evenly(len(dataset.test_labels), count)
    clean, labels = dataset.test_images[chosen], dataset.test_labels[chosen]
    images = MeasuredImages(clean, triggered(attack, clean), labels, attack.target_map)
    counted = images.counted
    for norm in norms:
        for size in eps:
            setting = {'measured': 'connection', 'norm': norm, 'eps': f'{size:g}/255', 'images': len(counted.labels)}
            own = probe.adversarial(variables, counted.clean, counted.labels, norm, size / 255)
            row = setting | columns(evaluate(probe, variables, own, images))
            if control is not None:
                transferred = probe.adversarial(control, counted.clean, counted.labels, norm, size / 255)
                on_transferred = columns(evaluate(probe, variables, transferred, images), '_benign_examples')
                row |= {name: value for name, value in on_transferred.items() if name in COLUMNS}
                yield setting | {'control': 'benign'} | columns(evaluate(probe, control, transferred, images))
            yield row


def columns(measured: Measured, suffix: str = '') -> dict[str, Any]:
    """Converts measurements to columns whose names end with `suffix`."""
    estimates = {
        f'target_share{suffix}': measured.target_share,
        f'feature_distance{suffix}': measured.feature_distance,
        **{f'neuron_{name}{suffix}': value for name, value in measured.neuron_overlap._asdict().items()},
    }
    row: dict[str, Any] = {f'fooled{suffix}': measured.fooled}
    for name, estimate in estimates.items():
        row |= {name: estimate.value, f'{name}_low': estimate.low, f'{name}_high': estimate.high}
    return row


def score_row(run: SavedRun, variables: dict, scorer: Scorer, eps: Sequence[float], count: int) -> dict[str, Any]:
    """Measures the infection score of one model on the defender's clean images."""
    dataset, attack = run.scenario.dataset, run.infected.attack
    chosen = run.scenario.clean[evenly(len(run.scenario.clean), count)]
    images, labels = dataset.train_images[chosen], dataset.train_labels[chosen]
    result = scorer.score(variables, images, labels, dataset.num_classes, tuple(size / 255 for size in eps))
    row = {
        'measured': 'score',
        'images': len(chosen),
        'score': result.hypothesis.score,
        'kind': result.hypothesis.kind,
        'suspected': ' '.join(map(str, result.hypothesis.target_map)),
        'crowding': result.crowding.score,
        'crowding_kind': result.crowding.kind,
    }
    if attack is not None:
        row['correct'] = float((result.hypothesis.target_map == attack.target_map).mean())
    return row


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Formats the scores of all models, and the ROC AUC of the scores for infected against benign models."""
    scored = [row for row in rows if row['measured'] == 'score']
    lines = [f'{"":<28}{"defense":<10}{"score":>7}  {"kind":<8} suspected']
    lines += [f'{r["run"]:<28}{r["defense"]:<10}{r["score"]:>7.3f}  {r["kind"]:<8} {r["suspected"]}' for r in scored]
    before = [row for row in scored if row['defense'] == UNPURIFIED]
    for name in ('score', 'crowding'):
        infected = np.array([row[name] for row in before if row['attack'] != BENIGN])
        benign = np.array([row[name] for row in before if row['attack'] == BENIGN])
        if len(infected) and len(benign):
            value = f'{auc(infected, benign):.3f} ({len(infected)} infected, {len(benign)} benign models)'
            lines.append(f'ROC AUC of the {name}: {value}')
    return '\n'.join(lines)
