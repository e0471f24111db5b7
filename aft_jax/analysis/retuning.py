"""Trains a model again on a few triggered images, and records how quickly the backdoor comes back."""

import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from aft_jax.attacks.attack import Attack, triggered
from aft_jax.data.dataset import Dataset
from aft_jax.defenses import DefenderData, ft
from aft_jax.evaluation.evaluator import Evaluator
from aft_jax.pipeline.saved_run import SavedRun
from aft_jax.pipeline.stages import defense_settings
from aft_jax.randomness import generator_for
from aft_jax.training.loop import EvalHook, EvalPoint, Run, fit

COLUMNS = ('run', 'attack', 'label_mode', 'seed', 'model', 'per_class', 'step', 'acc', 'asr')


class Retuning(NamedTuple):
    """How a model is trained again.

    Attributes:
        steps: Of training.
        every: Steps between two measurements.
        learning_rate: Constant.
        images: Test images that are scored.
    """

    steps: int = 60
    every: int = 5
    learning_rate: float = 0.01
    images: int = 2000


def retuning_set(
    attack: Attack, dataset: Dataset, clean: np.ndarray, poisoned: np.ndarray, per_class: int, seed: int
) -> dict[str, np.ndarray]:
    """Returns the arrays that a model is trained on again.

    Args:
        attack: As it is carried out.
        dataset: Clean.
        clean: int, the training images that the defender held: M of them.
        poisoned: int, the training images that carried the trigger; no further use is made of either.
        per_class: Triggered images of each class that the trigger does not leave alone; a class may have fewer.
        seed: The experiment's.

    Returns:
        'images' uint8 [2 M, H, W, C] and 'labels' int32 [2 M]: the clean ones, then the triggered ones repeated.
    """
    labels = dataset.train_labels
    order = generator_for(seed, 'relapse').permutation(len(labels))
    order = order[~np.isin(order, np.concatenate([clean, poisoned]))]
    classes = np.flatnonzero(attack.target_map != np.arange(len(attack.target_map)))
    few = np.concatenate([order[labels[order] == label][:per_class] for label in classes])
    again = np.resize(np.arange(len(few)), len(clean))
    return {
        'images': np.concatenate([dataset.train_images[clean], triggered(attack, dataset.train_images[few])[again]]),
        'labels': np.concatenate([labels[clean], attack.target_map[labels[few]][again]]).astype(np.int32),
    }


def retune(
    run: Run, name: str, source: SavedRun, evaluator: Evaluator, variables: dict, per_class: int, retuning: Retuning
) -> Iterator[dict[str, float]]:
    """Trains a model again and yields {'step', 'acc', 'asr'}, from step 0.

    Args:
        run: Where checkpoints and metrics go.
        name: Of the stage.
        source: The run that the model and the attack are of.
        evaluator: Of the run's test images.
        variables: The model's.
        per_class: See `retuning_set`.
        retuning: How.
    """
    attack, scenario = source.infected.attack, source.scenario
    assert attack is not None

    def measure(point: EvalPoint) -> dict[str, float]:
        scores = evaluator(point.state.variables, attack)
        return {'test_acc': scores.acc, 'test_asr': scores.asr}

    clean, poisoned = scenario.clean, scenario.poisoned.indices
    arrays = retuning_set(attack, scenario.dataset, clean, poisoned, per_class, source.config.seed)
    settings = defense_settings('ft', source.config)
    settings = settings._replace(options=settings.options._replace(schedule='constant'))
    data = DefenderData(scenario.module, variables, arrays['images'], arrays['labels'])
    stage = ft.fine_tuning_stage(name, data, settings, steps=retuning.steps, learning_rate=retuning.learning_rate)
    first = measure(EvalPoint(name, 0, 0.0, stage.state))
    yield {'step': 0, 'acc': first['test_acc'], 'asr': first['test_asr']}
    fit(run, stage._replace(eval_hooks=(EvalHook(measure, every_steps=retuning.every),)))
    for line in (run.workdir / 'metrics.jsonl').read_text().splitlines():
        entry = json.loads(line)
        if entry['stage'] == name and 'test_asr' in entry:
            yield {'step': entry['step'], 'acc': entry['test_acc'], 'asr': entry['test_asr']}
