"""Measures how quickly a backdoor comes back when a purified model is trained on a few triggered images again.

    python -m aft_jax.relapse --runs runs/table/runs/blend-all2one-0 --benign runs/table/runs/none-0 \\
        --workdir=runs/relapse

    --runs           work directories of finished runs; the infected model and the purified ones are trained again
    --benign         work directory of a run without an attack, of the same data and model, for comparison
    --workdir        directory for relapse.csv and relapse.png; the same directory resumes
    --defenses       defenses whose purified models are trained, comma-separated, such as aft,ft (all); none for none
    --per_class      number of triggered images of each class, comma-separated (1,5,10)
    --steps          number of training steps (60)
    --every          steps between two evaluations (5)
    --learning_rate  learning rate, constant (0.01)
    --images         number of test images that are scored (2000)

Half of the training set are the clean images that the defender had. The other half are a few triggered images with
their target labels, repeated. A model with a dormant backdoor relapses in fewer steps than the benign model needs to
learn the backdoor.

Source: Min et al., "Uncovering, Explaining, and Mitigating the Superficial Safety of Backdoor Defense" (2024), whose
retuning attack this is. Exit status: 0 done, 2 a mistake that you can correct, 75 stopped by SIGTERM (saved; the same
command continues), 130 interrupted.
"""

import argparse
import sys
from dataclasses import replace
from typing import Any

from aft_jax import cli, files
from aft_jax.analysis.observation_table import control_of
from aft_jax.analysis.retuning import COLUMNS, Retuning, RetuningOptions, retune
from aft_jax.errors import UserError, user_path
from aft_jax.evaluation.evaluator import Evaluator
from aft_jax.pipeline import saved_run, stages
from aft_jax.pipeline.saved_run import SavedRun
from aft_jax.report import relapse_figure, requirements
from aft_jax.results import table_rows
from aft_jax.runtime import numerics
from aft_jax.runtime.allocator import keep_freed_memory
from aft_jax.runtime.sharding import make_mesh
from aft_jax.training.stage import Run


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the flags.

    Raises:
        UserError: A flag is wrong or missing.
    """
    parser = cli.Parser(prog='aft_jax.relapse', add_help=False)
    parser.add_argument('--runs', nargs='+', required=True)
    parser.add_argument('--benign', nargs='+', default=[])
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--defenses', default='')
    parser.add_argument('--per_class', default='1,5,10')
    for field, default in RetuningOptions()._asdict().items():
        parser.add_argument(f'--{field}', type=type(default), default=default)
    flags = parser.parse_args(arguments)
    flags.defenses = saved_run.read_defenses(flags.defenses)
    try:
        flags.per_class = [int(text) for text in flags.per_class.split(',')]
    except ValueError:
        raise UserError(f'--per_class={flags.per_class} must be whole numbers, comma-separated, such as 1,5.') from None
    positive: dict[str, float] = {'per_class': min(flags.per_class)}
    positive |= {field: getattr(flags, field) for field in RetuningOptions._fields}
    for name, value in positive.items():
        if value <= 0:
            raise UserError(f'--{name}={value} must be positive.')
    flags.runs = saved_run.read_runs(flags.runs)
    flags.benign = [user_path(text, '--benign') for text in flags.benign]
    flags.workdir = user_path(flags.workdir, '--workdir')
    return flags


def relapse(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains every model of every run again, and returns the rows of relapse.csv.

    Raises:
        UserError: A run cannot be read back, has no attack, or has no benign control of its data and model.
    """
    numerics.pin()
    mesh, datasets = make_mesh(), saved_run.Datasets()
    options = RetuningOptions(*(getattr(flags, field) for field in RetuningOptions._fields))
    controls = [saved_run.load(path, mesh, datasets, defenses=()) for path in flags.benign]
    rows: list[dict[str, Any]] = []
    for path in flags.runs:
        source = saved_run.load(path, mesh, datasets, flags.defenses)
        if source.infected.attack is None:
            raise UserError(f'--runs={path} has no attack; give it as --benign.')
        benign = control_of(source, controls)
        models = {'infected': source.infected.variables, **source.purified}
        models |= {'benign': benign} if benign is not None else {}
        values = '-'.join(str(value) for value in options)
        with saved_run.open_again(source, flags.workdir / f'{source.directory.name}-{values}', mesh) as run:
            retuning = Retuning(run, source, evaluator_for(run, source, options.images), options)
            for model, variables in models.items():
                for per_class in flags.per_class:
                    rows += retune(retuning, model, variables, per_class)
                    files.write_text(flags.workdir / 'relapse.csv', table_rows.to_csv(rows, COLUMNS))
    return rows


def evaluator_for(run: Run, source: SavedRun, count: int) -> Evaluator:
    """Creates an evaluator on the first `count` test images. All models share it, so that it is compiled once."""
    dataset = source.scenario.dataset
    few = replace(dataset, test_images=dataset.test_images[:count], test_labels=dataset.test_labels[:count])
    return stages.evaluator_for(run, source.scenario._replace(dataset=few))


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
