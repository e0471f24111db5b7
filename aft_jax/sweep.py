"""Run a table of experiments, each once, and gather them.

    python -m aft_jax.sweep --config=configs/tables/fashion_mnist.py --workdir=runs/table [--shard=0/2]

    --config     a file of configs/tables/, or one of your own like them
    --workdir    every run gets WORKDIR/runs/NAME; table.csv, table.md, infected.csv, detection.csv (where a defense
                 looks for poisoned images), table.png and index.html, a page that shows the table, stand in WORKDIR
    --shard      i/n: only every n-th experiment from the i-th, so that n machines that share the folder share the work
    --config.FIELD    such as --config.select=sig,wanet --config.seeds="(0,)" --config.defenses=ft,aft

The same command again skips what is finished, resumes what was interrupted and tries again what failed. The tables are
written anew after each run, from all finished runs of the table, whoever made them.

Exit status: 0 every experiment of the table that was this command's is finished, 1 some failed (the others are
finished), 2 something that you can put right before anything starts, 75 told to stop by SIGTERM, 130 interrupted.
"""

import logging
import sys
import traceback
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from aft_jax.cli import EXIT_FAILURES, EXIT_INTERRUPTED, EXIT_PREEMPTED, complain, parse
from aft_jax.errors import UserError, user_path
from aft_jax.runtime.allocator import keep_freed_memory

FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file('config', None, 'A file of configs/tables/.', flag_values=FLAGS)
flags.DEFINE_string('workdir', None, 'Where the runs and the table go; the same one resumes.', flag_values=FLAGS)
flags.DEFINE_string('shard', '0/1', 'i/n, with i from 0.', flag_values=FLAGS)


def main(arguments: list[str]) -> int:
    """Runs a table; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    logging.getLogger('absl').setLevel(logging.CRITICAL)
    if {'--help', '-h', '--helpfull'} & set(arguments):
        print(__doc__)
        return 0
    try:
        parse(arguments, FLAGS)
        keep_freed_memory()
        from aft_jax.pipeline import grid
        from aft_jax.runtime.preemption import Preempted
    except UserError as error:
        return complain(error)
    try:
        root = user_path(str(FLAGS.workdir), '--workdir')
        experiments = grid.expand(FLAGS.config)
        failures = run(root, experiments, grid.share(experiments, FLAGS.shard))
    except UserError as error:
        return complain(error)
    except Preempted:
        print('aft_jax: told to stop; all is saved, and the same command goes on.', file=sys.stderr)
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        print('aft_jax: interrupted; the same command goes on.', file=sys.stderr)
        return EXIT_INTERRUPTED
    for name, reason in failures.items():
        print(f'aft_jax: {name} failed: {reason}', file=sys.stderr)
    return EXIT_FAILURES if failures else 0


def run(root: Path, experiments: list, mine: list) -> dict[str, str]:
    """Runs what is not finished, and gathers the table.

    Args:
        root: The table's work directory.
        experiments: All of the table.
        mine: Those to be run here.

    Returns:
        Why each experiment that failed did, by its name.
    """
    import jax

    from aft_jax.experiment import run_experiment
    from aft_jax.pipeline import grid
    from aft_jax.results import terminal
    from aft_jax.runtime.preemption import Preempted

    failures = {}
    for number, experiment in enumerate(mine, 1):
        directory = grid.directory_of(root, experiment)
        if is_finished(directory, experiment):
            print(f'[{number}/{len(mine)}] {experiment.name}: finished earlier', flush=True)
            continue
        print(f'[{number}/{len(mine)}] {experiment.name}', flush=True)
        try:
            print(terminal.table(run_experiment(experiment.config, directory)), flush=True)
            (directory / 'error.txt').unlink(missing_ok=True)
        except Preempted:
            raise
        except UserError as error:
            failures[experiment.name] = str(error)
        except Exception as error:  # The others should not suffer; what happened is kept in full.
            directory.mkdir(parents=True, exist_ok=True)
            (directory / 'error.txt').write_text(traceback.format_exc())
            failures[experiment.name] = f'{type(error).__name__} (see {directory / "error.txt"})'
        if experiment.name in failures:
            print(f'{experiment.name} failed: {failures[experiment.name]}', file=sys.stderr, flush=True)
        jax.clear_caches()
        gather(root, experiments)
    gather(root, experiments)
    return failures


def measured(directory: Path, experiment) -> set[str] | None:
    """Returns the defenses that a run of this very experiment has measured, or None where there is no such run."""
    from aft_jax.config import resolve
    from aft_jax.defenses import DEFENSES
    from aft_jax.results import record, workdir
    from aft_jax.results.workdir import RunFiles

    try:
        found = record.read(RunFiles(directory).results).purified
        differs = workdir.differences(directory, resolve(experiment.config), DEFENSES)
    except (OSError, ValueError):
        return None
    return None if differs else set(found)


def is_finished(directory: Path, experiment) -> bool:
    """Whether a run has measured all that its config asks for; one of another config counts as unfinished."""
    from aft_jax import validation

    config = experiment.config
    wanted = set(validation.names(config.defenses)) if 'purify' in config.stages else set()
    found = measured(directory, experiment)
    return found is not None and wanted <= found


def gather(root: Path, experiments: list) -> None:
    """Writes the tables of all finished runs; what is drawn too, where that can be done."""
    from aft_jax import files
    from aft_jax.pipeline import grid
    from aft_jax.report import requirements, score_bars, table_page
    from aft_jax.results import aggregate, table_rows

    directories = [(grid.directory_of(root, experiment), experiment) for experiment in experiments]
    finished = [directory for directory, experiment in directories if measured(directory, experiment) is not None]
    if not finished:
        return
    rows = table_rows.read(finished)
    groups = aggregate.summarise(rows)
    files.write_text(root / 'table.csv', table_rows.to_csv(rows))
    infected = (row for row in rows if row['defense'] == 'none')
    files.write_text(root / 'infected.csv', table_rows.to_csv(infected, table_rows.INFECTED_COLUMNS))
    detections = list(table_rows.detection_rows(rows))
    if detections:
        files.write_text(root / 'detection.csv', table_rows.to_csv(detections, table_rows.DETECTION_COLUMNS))
    files.write_text(root / 'table.md', aggregate.to_markdown(groups))
    if requirements.available():
        score_bars.write_bars(root / 'table.png', groups)
    if not requirements.missing('matplotlib', 'jinja2'):
        table_page.write_table_page(root / 'index.html', groups)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
