"""Trains a model again on a few triggered images, and records how quickly the backdoor comes back.

Source: Min et al., "Uncovering, Explaining, and Mitigating the Superficial Safety of Backdoor Defense" (2024), who call
it the retuning attack.
"""

import json
import shutil
from typing import Any, NamedTuple

import numpy as np

from aft_jax import files
from aft_jax.attacks.attack import Attack, triggered
from aft_jax.data.dataset import Dataset
from aft_jax.defenses import DefenderData, ft
from aft_jax.evaluation.evaluator import Evaluator
from aft_jax.pipeline.saved_run import SavedRun
from aft_jax.pipeline.stages import defense_settings
from aft_jax.randomness import generator_for
from aft_jax.training.loop import fit
from aft_jax.training.stage import EvalHook, EvalPoint, Run

COLUMNS = ('run', 'attack', 'label_mode', 'seed', 'model', 'per_class', 'step', 'acc', 'asr')


class RetuningOptions(NamedTuple):
    """Options of the retuning.

    Attributes:
        steps: Number of training steps.
        every: Steps between two evaluations.
        learning_rate: Learning rate, constant.
        images: Number of test images that are scored.
    """

    steps: int = 60
    every: int = 5
    learning_rate: float = 0.01
    images: int = 2000


class Retuning(NamedTuple):
    """What the retunings of all models of a saved run share.

    Attributes:
        run: Run whose directory keeps the metrics and rows.
        source: Saved run with the models and the attack.
        evaluator: Evaluator on the first `options.images` test images.
        options: Options of the training.
    """

    run: Run
    source: SavedRun
    evaluator: Evaluator
    options: RetuningOptions


def retuning_set(
    attack: Attack, dataset: Dataset, clean: np.ndarray, poisoned: np.ndarray, *, per_class: int, seed: int
) -> dict[str, np.ndarray]:
    """Builds the training set: the defender's clean images, and as many triggered ones.

    The triggered images are a few training images that are neither clean nor poisoned ones of the experiment. They are
    repeated until they are as many as the clean ones.

    Args:
        attack: Attack of the saved run.
        dataset: Clean data set.
        clean: Indices of the training images that the defender has, int [M].
        poisoned: Indices of the training images that carry the trigger, int.
        per_class: Number of triggered images of each class whose target label differs. A class may have fewer.
        seed: Seed of the experiment.

    Returns:
        'images' uint8 [2 M, H, W, C] and 'labels' int32 [2 M]: the clean ones, then the triggered ones.
    """
    labels = dataset.train_labels
    order = generator_for(seed, 'relapse').permutation(len(labels))
    order = order[~np.isin(order, np.concatenate([clean, poisoned]))]
    classes = np.flatnonzero(attack.target_map != np.arange(len(attack.target_map)))
    few = np.concatenate([order[labels[order] == label][:per_class] for label in classes])
    repeated = np.resize(np.arange(len(few)), len(clean))
    return {
        'images': np.concatenate([dataset.train_images[clean], triggered(attack, dataset.train_images[few])[repeated]]),
        'labels': np.concatenate([labels[clean], attack.target_map[labels[few]][repeated]]).astype(np.int32),
    }


def retune(retuning: Retuning, model: str, variables: dict, per_class: int) -> list[dict[str, Any]]:
    """Trains a model again, and scores it before the first step and every few steps.

    A retuning is short, so it is never resumed in the middle. Its rows are kept in a file once it has finished. An
    interrupted one starts again from step 0, and gives the same rows.

    Args:
        retuning: Run, models and options.
        model: Name of the model: 'infected', a defense, or 'benign'.
        variables: Variables of the model.
        per_class: Number of triggered images of each class.

    Returns:
        Rows of relapse.csv, from step 0.
    """
    run, config = retuning.run, retuning.source.config
    name = f'relapse/{model}-{per_class}'
    path = run.workdir / f'{name}.json'
    if path.exists():
        points = json.loads(path.read_text(encoding='utf-8'))
    else:
        points = _train(retuning, name, variables, per_class)
        path.parent.mkdir(exist_ok=True)
        files.write_json(path, points)
    shared = {
        'run': retuning.source.directory.name,
        'attack': config.attack.name,
        'label_mode': config.attack.label_mode,
        'seed': config.seed,
        'model': model,
        'per_class': per_class,
    }
    return [shared | point for point in points]


def _train(retuning: Retuning, name: str, variables: dict, per_class: int) -> list[dict[str, Any]]:
    """Trains a model from step 0, and returns 'step', 'acc' and 'asr' of each evaluation."""
    run, source, evaluator, options = retuning
    attack, scenario, config = source.infected.attack, source.scenario, source.config
    assert attack is not None
    points: list[dict[str, Any]] = []

    def evaluate(point: EvalPoint) -> dict[str, float]:
        scores = evaluator.evaluate(point.state.variables, attack)
        points.append({'step': point.step, 'acc': scores.acc, 'asr': scores.asr})
        return {'test_acc': scores.acc, 'test_asr': scores.asr}

    arrays = retuning_set(
        attack, scenario.dataset, scenario.clean, scenario.poisoned.indices, per_class=per_class, seed=config.seed
    )
    settings = defense_settings('ft', config)
    settings = settings._replace(options=settings.options._replace(schedule='constant'))
    data = DefenderData(scenario.module, variables, arrays['images'], arrays['labels'])
    stage = ft.fine_tuning_stage(name, data, settings, steps=options.steps, learning_rate=options.learning_rate)
    hook = EvalHook(evaluate, every_steps=options.every, at_start=True)
    # A stage that resumed from a checkpoint would not evaluate its earlier steps again.
    checkpoints = run.workdir / 'checkpoints' / name
    shutil.rmtree(checkpoints, ignore_errors=True)
    fit(run, stage._replace(eval_hooks=(hook,)))
    shutil.rmtree(checkpoints, ignore_errors=True)
    return points
