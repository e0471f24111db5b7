"""How quickly a backdoor comes back when a purified model is trained on a few triggered images again.

    python -m aft_jax.relapse --runs runs/table/runs/blend-all2one-0 --benign runs/table/runs/none-0 \\
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
retuning attack this is. Exit status: 0 done, 2 a mistake that you can correct, 75 stopped by SIGTERM (saved; the same
command continues), 130 interrupted.
"""

import argparse
import contextlib
import sys
from dataclasses import replace
from typing import Any

from aft_jax import cli, files
from aft_jax.analysis.observation_table import control_of
from aft_jax.analysis.retuning import COLUMNS, Retuning, retune
from aft_jax.config import as_options
from aft_jax.errors import UserError, user_path
from aft_jax.models.cpu_compilation import compiler_options
from aft_jax.pipeline import saved_run, stages
from aft_jax.report import relapse_figure, requirements
from aft_jax.results import table_rows
from aft_jax.runtime.allocator import keep_freed_memory
from aft_jax.runtime.preemption import Watch
from aft_jax.runtime.sharding import make_mesh
from aft_jax.training.loop import Run, RunOptions
from aft_jax.training.metrics import MetricWriter


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the flags' values.

    Raises:
        UserError: One is wrong or missing.
    """
    parser = cli.Parser(prog='aft_jax.relapse', add_help=False)
    parser.add_argument('--runs', nargs='+', required=True)
    parser.add_argument('--benign', nargs='+', default=[])
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--defenses', default='')
    parser.add_argument('--per_class', default='1,5,10')
    defaults = Retuning()
    for field in Retuning._fields:
        parser.add_argument(f'--{field}', type=type(getattr(defaults, field)), default=getattr(defaults, field))
    flags = parser.parse_args(arguments)
    flags.defenses = saved_run.read_defenses(flags.defenses)
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
    mesh, datasets = make_mesh(), saved_run.Datasets()
    retuning = Retuning(*(getattr(flags, field) for field in Retuning._fields))
    controls = [saved_run.load(path, mesh, datasets, defenses=()) for path in flags.benign]
    rows: list[dict[str, Any]] = []
    for path in flags.runs:
        source = saved_run.load(path, mesh, datasets, flags.defenses)
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
            options = compiler_options(source.scenario.module)
            run = Run(
                source.config.seed, directory, mesh, writer, as_options(RunOptions, source.config.run), watch, options
            )
            # One for all models: triggers are put on, and predictions compiled, once.
            dataset, count = source.scenario.dataset, retuning.images
            few = replace(dataset, test_images=dataset.test_images[:count], test_labels=dataset.test_labels[:count])
            evaluator = stages.evaluator_for(run, source.scenario._replace(dataset=few))
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
                    points = retune(run, stage, source, evaluator, variables, per_class, retuning)
                    rows += [shared | point for point in points]
                    files.write_text(flags.workdir / 'relapse.csv', table_rows.to_csv(rows, COLUMNS))
    return rows


def main(arguments: list[str]) -> int:
    """Runs the command, and returns its exit status."""
    return cli.run(_command, __doc__, arguments)


def _command(arguments: list[str]) -> int:
    flags = parse(arguments)
    keep_freed_memory()
    rows = relapse(flags)
    if requirements.available():
        relapse_figure.write(flags.workdir / 'relapse.png', rows)
    print(f'{flags.workdir}/relapse.csv')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
