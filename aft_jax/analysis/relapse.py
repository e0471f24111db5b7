"""How quickly a backdoor comes back when a purified model is trained on a few triggered images again.

    python -m aft_jax.analysis.relapse --runs runs/table/runs/blend-all2one-0 --benign runs/table/runs/none-0 \\
        --workdir=runs/relapse

    --runs           work directories of finished runs: the infected model and every purified one are trained further
    --benign         a run without an attack, of the same data and model: how quickly an innocent model learns it
    --workdir        relapse.csv and relapse.png; the same one resumes
    --defenses       whose purified models, comma-separated, such as aft,ft (all); none for no one's
    --per_class      triggered images of each class, comma-separated (1,5,10)
    --steps          of training (60)
    --every          steps between two measurements (5)
    --learning_rate  constant (0.01)
    --images         test images that are scored (2000)

Half of what a batch is drawn from are the clean images that the defender held, the other half the few triggered ones,
with the labels that the trigger commands, over and over. A model in which the backdoor sleeps relapses in fewer steps
than the benign one takes to learn it.

Source: Min et al., "Uncovering, Explaining, and Mitigating the Superficial Safety of Backdoor Defense" (2024), whose
retuning attack this is. Exit status: 0 done, 2 something that you can put right.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from aft_jax import collect, workdir
from aft_jax.allocator import keep_freed_memory
from aft_jax.analysis import finished
from aft_jax.analysis.finished import Finished
from aft_jax.analysis.table import control_of
from aft_jax.attacks.attack import Attack, triggered
from aft_jax.command_line import Parser, complain
from aft_jax.data.augment import augment
from aft_jax.data.dataset import Dataset
from aft_jax.defenses.defender import Holdings, begin
from aft_jax.errors import UserError, user_path
from aft_jax.judge import Judge
from aft_jax.models.cpu_options import compiler_options
from aft_jax.randomness import generator_for
from aft_jax.report import pictures, relapse_figure
from aft_jax.training.loop import Phase, Run, fit
from aft_jax.training.mesh import make_mesh
from aft_jax.training.metrics import MetricWriter
from aft_jax.training.preemption import Watch
from aft_jax.training.steps import classification_step

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
    run: Run, name: str, source: Finished, judge: Judge, variables: dict, per_class: int, retuning: Retuning
) -> Iterator[dict[str, float]]:
    """Trains a model again and yields {'step', 'acc', 'asr'}, from step 0.

    Args:
        run: Where checkpoints and metrics go.
        name: Of the stage.
        source: The run that the model and the attack are of.
        judge: Of the run's test images.
        variables: The model's.
        per_class: See `retuning_set`.
        retuning: How.
    """
    attack, victim = source.infected.attack, source.victim
    assert attack is not None

    def measure(state: Any) -> dict[str, float]:
        scores = judge(state.variables, attack)
        return {'test_acc': scores.acc, 'test_asr': scores.asr}

    clean, poisoned = victim.clean, victim.poisoned.indices
    arrays = retuning_set(attack, victim.dataset, clean, poisoned, per_class, source.config.seed)
    options = source.config.ft.copy_and_resolve_references()
    options.schedule = 'constant'
    holdings = Holdings(victim.module, variables, arrays['images'], arrays['labels'])
    before, optimiser = begin(holdings, options, source.config.train, retuning.steps, retuning.learning_rate)
    step = partial(
        classification_step,
        module=victim.module,
        optimiser=optimiser,
        transform=lambda key, images, labels: (augment(key, images, source.config.augment), labels),
    )
    first = measure(before)
    yield {'step': 0, 'acc': first['test_acc'], 'asr': first['test_asr']}
    phases = [Phase(step, retuning.steps)]
    fit(run, name, before, phases, arrays, source.config.batch_size, probe=measure, probe_every=retuning.every)
    for line in (run.workdir / 'metrics.jsonl').read_text().splitlines():
        entry = json.loads(line)
        if entry['stage'] == name and 'test_asr' in entry:
            yield {'step': entry['step'], 'acc': entry['test_acc'], 'asr': entry['test_asr']}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the flags' values.

    Raises:
        UserError: One is wrong or missing.
    """
    parser = Parser(prog='aft_jax.analysis.relapse', add_help=False)
    parser.add_argument('--runs', nargs='+', required=True)
    parser.add_argument('--benign', nargs='+', default=[])
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--defenses', default='')
    parser.add_argument('--per_class', default='1,5,10')
    defaults = Retuning()
    for field in Retuning._fields:
        parser.add_argument(f'--{field}', type=type(getattr(defaults, field)), default=getattr(defaults, field))
    flags = parser.parse_args(arguments)
    flags.defenses = finished.read_defenses(flags.defenses)
    try:
        flags.per_class = [int(text) for text in flags.per_class.split(',')]
    except ValueError:
        raise UserError(f'--per_class={flags.per_class} must be whole numbers, comma-separated, such as 1,5.') from None
    positive: dict[str, float] = {'per_class': min(flags.per_class)}
    positive |= {field: getattr(flags, field) for field in Retuning._fields}
    for name, value in positive.items():
        if value <= 0:
            raise UserError(f'--{name}={value} must be positive.')
    flags.runs, flags.benign = (
        [user_path(text, flag) for text in texts]
        for flag, texts in (('--runs', flags.runs), ('--benign', flags.benign))
    )
    if len({path.name for path in flags.runs}) < len(flags.runs):
        raise UserError('--runs has two directories of the same name, which could not be told apart; rename one.')
    flags.workdir = user_path(flags.workdir, '--workdir')
    return flags


def relapse(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains every model of every run again, and returns the rows of relapse.csv."""
    mesh, datasets = make_mesh(), finished.Datasets()
    retuning = Retuning(*(getattr(flags, field) for field in Retuning._fields))
    controls = [finished.load(path, mesh, datasets, defenses=()) for path in flags.benign]
    rows: list[dict[str, Any]] = []
    for path in flags.runs:
        source = finished.load(path, mesh, datasets, flags.defenses)
        if source.infected.attack is None:
            raise UserError(f'--runs={path} has no attack; give it as --benign.')
        benign = control_of(source, controls)
        models = {'infected': source.infected.variables, **source.purified}
        models |= {'benign': benign} if benign is not None else {}
        # A directory for each way to train, so that another one does not go on from its checkpoints.
        way = '-'.join(str(value) for value in retuning)
        directory = flags.workdir / f'{source.directory.name}-{way}'
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(MetricWriter(directory)) as writer, Watch() as watch:
            options = compiler_options(source.victim.module)
            run = Run(source.config.seed, directory, mesh, writer, source.config.run, watch, options)
            # One for all models: triggers are put on, and predictions compiled, once.
            dataset, count = source.victim.dataset, retuning.images
            few = replace(dataset, test_images=dataset.test_images[:count], test_labels=dataset.test_labels[:count])
            judge = Judge(source.victim._replace(dataset=few), run)
            for model, variables in models.items():
                for per_class in flags.per_class:
                    shared = {
                        'run': source.directory.name,
                        'attack': source.config.attack.name,
                        'label_mode': source.config.attack.label_mode,
                        'seed': source.config.seed,
                        'model': model,
                        'per_class': per_class,
                    }
                    stage = f'relapse/{model}-{per_class}'
                    points = retune(run, stage, source, judge, variables, per_class, retuning)
                    rows += [shared | point for point in points]
                    workdir.write_text(flags.workdir / 'relapse.csv', collect.to_csv(rows, COLUMNS))
    return rows


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit status."""
    if not arguments or {'--help', '-h'} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    try:
        flags = parse(arguments)
        keep_freed_memory()
        rows = relapse(flags)
    except UserError as error:
        return complain(error)
    if pictures.available():
        relapse_figure.write(flags.workdir / 'relapse.png', rows)
    print(f'{flags.workdir}/relapse.csv')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
