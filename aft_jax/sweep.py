"""Runs a table of experiments, each once, and gathers their results.

    python -m aft_jax.sweep --config=configs/tables/fashion_mnist.py --workdir=runs/table [--shard=0/2]

    --config     a file of configs/tables/, or one of your own like them
    --workdir    directory of the table; every run gets WORKDIR/runs/NAME
    --shard      i/n: only every n-th experiment from the i-th, so that n machines with one folder share the work
    --config.FIELD    such as --config.select=sig,wanet --config.seeds="(0,)" --config.defenses=ft,aft

WORKDIR holds table.csv, table.md, infected.csv, table.png and index.html, a page that shows the table. If a defense
detects poisoned images, detection.csv is there too. If the table has random triggers, WORKDIR also holds
distribution.csv and distribution.png, which show the ASR that each defense leaves on them, and draws.csv with every
trigger and its scores. The tables are written after each run, from all finished runs of the table.

The same command again skips what is finished, resumes what was interrupted and tries again what failed.

Exit status: 0 all experiments of this command are finished, 1 some failed (the others are finished), 2 a mistake that
you can correct before anything starts, 75 stopped by SIGTERM (saved; the same command continues), 130 interrupted.
"""

import contextlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags

from aft_jax import cli, files
from aft_jax.config import table_config
from aft_jax.errors import Preempted, UserError, user_path
from aft_jax.runtime.allocator import keep_freed_memory

if TYPE_CHECKING:
    from aft_jax.pipeline.grid import Experiment
    from aft_jax.results.distribution import Distribution

FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file('config', None, 'A file of configs/tables/.', flag_values=FLAGS)
flags.DEFINE_string('workdir', None, 'Directory for the runs and the table; the same one resumes.', flag_values=FLAGS)
flags.DEFINE_string('shard', '0/1', 'i/n, with i from 0.', flag_values=FLAGS)


def main(arguments: list[str]) -> int:
    """Runs the command, and returns its exit status. `arguments` is like sys.argv."""
    return cli.run(_command, __doc__, arguments)


def _command(arguments: list[str]) -> int:
    cli.parse(arguments, FLAGS, table_config({}), 'the config of a table')
    keep_freed_memory()
    from aft_jax.pipeline import grid
    from aft_jax.runtime.sharding import make_mesh

    root = user_path(str(FLAGS.workdir), '--workdir')
    experiments = grid.expand(FLAGS.config)
    mine = grid.share(experiments, FLAGS.shard)
    make_mesh()  # an absent platform is a mistake, and not a failure of every experiment
    with open_root(root, FLAGS.shard):
        failures = run(root, experiments, mine)
    for name, reason in failures.items():
        print(f'aft_jax: {name} failed: {reason}', file=sys.stderr)
    return cli.EXIT_FAILURES if failures else 0


@contextlib.contextmanager
def open_root(root: Path, shard: str) -> Iterator[None]:
    """Creates the work directory of a table, and locks the shard in it.

    Raises:
        UserError: The directory cannot be written, or another process runs this shard.
    """
    from aft_jax.results import lock

    name = f'.lock-{shard.replace("/", "-")}'
    try:
        root.mkdir(parents=True, exist_ok=True)
        held = lock.lock(root, '--workdir', name)
    except OSError as error:
        raise UserError(f'--workdir={root} cannot be written ({error.strerror}); name another directory.') from error
    with held, files.explained(root / name):
        yield


def run(root: Path, experiments: 'Sequence[Experiment]', mine: 'Sequence[Experiment]') -> dict[str, str]:
    """Runs the experiments that are not finished, and writes the tables after each.

    Args:
        root: Work directory of the table.
        experiments: All experiments of the table.
        mine: Experiments to run here.

    Returns:
        Reason of each failure, by the experiment's name.

    Raises:
        Preempted: SIGTERM stopped the experiment that ran.
    """
    import jax

    from aft_jax.pipeline import grid

    failures = {}
    gathered = False
    for number, experiment in enumerate(mine, 1):
        directory = grid.directory_of(root, experiment)
        progress = f'[{number}/{len(mine)}] {experiment.name}'
        if is_finished(directory, experiment):
            print(f'{progress}: finished earlier', flush=True)
            continue
        print(progress, flush=True)
        if reason := _run_one(directory, experiment):
            failures[experiment.name] = reason
            print(f'{experiment.name} failed: {reason}', file=sys.stderr, flush=True)
        jax.clear_caches()
        gather(root, experiments)
        gathered = True
    if not gathered:
        gather(root, experiments)
    return failures


def _run_one(directory: Path, experiment: 'Experiment') -> str:
    """Runs an experiment and prints its table. Returns the reason of a failure, or ''.

    The traceback of an unexpected exception is kept in error.txt, so that the other experiments still run.
    """
    from aft_jax.experiment import run_experiment
    from aft_jax.results import terminal

    error_file = directory / 'error.txt'
    try:
        print(terminal.table(run_experiment(experiment.config, directory)), flush=True)
        error_file.unlink(missing_ok=True)
    except Preempted:
        raise
    except UserError as error:
        return str(error)
    except Exception as error:
        directory.mkdir(parents=True, exist_ok=True)
        error_file.write_text(traceback.format_exc(), encoding='utf-8')
        return f'{type(error).__name__} (see {error_file})'
    return ''


def measured_defenses(directory: Path, experiment: 'Experiment') -> set[str] | None:
    """Reads which defenses a run has measured. None if there is no results.json, or the run has another config."""
    from aft_jax.config import resolve
    from aft_jax.defenses import DEFENSES
    from aft_jax.results import record, workdir
    from aft_jax.results.workdir import RunFiles

    try:
        purified = record.read(RunFiles(directory).results).purified
        differs = workdir.differences(directory, resolve(experiment.config), DEFENSES)
    except (OSError, ValueError):
        return None
    return None if differs else set(purified)


def is_finished(directory: Path, experiment: 'Experiment') -> bool:
    """Whether a run has measured all defenses of its config. A run with another config is not finished."""
    from aft_jax.config import split_names

    config = experiment.config
    expected = set(split_names(config.defenses)) if 'purify' in config.stages else set()
    measured = measured_defenses(directory, experiment)
    return measured is not None and expected <= measured


def gather(root: Path, experiments: 'Sequence[Experiment]') -> None:
    """Writes the tables of all finished runs, and their figure and page if the libraries for these are installed."""
    from aft_jax.pipeline import grid
    from aft_jax.report import distribution_figure, requirements, score_bars, table_page
    from aft_jax.results import aggregate, distribution, table_rows

    directories = [(grid.directory_of(root, experiment), experiment) for experiment in experiments]
    finished = [pair for pair in directories if measured_defenses(*pair) is not None]
    if not finished:
        return
    rows = table_rows.read(directory for directory, _ in finished)
    groups = aggregate.summarise(rows)
    files.write_text(root / 'table.csv', table_rows.to_csv(rows))
    infected = (row for row in rows if row['defense'] == 'none')
    files.write_text(root / 'infected.csv', table_rows.to_csv(infected, table_rows.INFECTED_COLUMNS))
    detections = list(table_rows.detection_rows(rows))
    if detections:
        files.write_text(root / 'detection.csv', table_rows.to_csv(detections, table_rows.DETECTION_COLUMNS))
    distributions = gather_random_triggers(root, finished)
    tables = aggregate.to_markdown(groups) + distribution.to_markdown(distributions)
    files.write_text(root / 'table.md', tables)
    if requirements.available():
        score_bars.write_bars(root / 'table.png', groups)
        distribution_figure.draw(root, distributions)
    if not requirements.missing('matplotlib', 'jinja2'):
        table_page.write_table_page(root / 'index.html', groups, distributions)


def gather_random_triggers(root: Path, finished: 'Sequence[tuple[Path, Experiment]]') -> 'list[Distribution]':
    """Writes draws.csv and distribution.csv, if the table has random triggers.

    Args:
        root: Work directory of the table.
        finished: Work directory and experiment of each finished run.

    Returns:
        The content of distribution.csv; empty without random triggers.
    """
    from aft_jax.attacks import random_trigger
    from aft_jax.results import distribution, trigger_rows

    configs = [(directory, experiment.config) for directory, experiment in finished]
    rows = trigger_rows.read(pair for pair in configs if pair[1].attack.name == random_trigger.NAME)
    distributions = distribution.summarise(rows)
    if distributions:
        files.write_text(root / 'draws.csv', trigger_rows.draws_csv(rows))
        files.write_text(root / 'distribution.csv', distribution.to_csv(distributions))
    return distributions


if __name__ == '__main__':
    sys.exit(main(sys.argv))
