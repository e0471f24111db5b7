"""Scans the models of finished runs, whose triggers are known, and measures how often the verdict is right.

    python -m aft_jax.scan_runs --runs runs/table/runs/* --workdir=runs/scans

    --runs      work directories of finished runs, infected and benign ones; their purified models are scanned too
    --workdir   directory for scans.csv, scans.png and the reference models; the same directory resumes
    --defenses  defenses whose purified models are scanned, comma-separated, such as aft,ft (all); none for none

scans.csv has a row for each model and kind of change. The command prints in how many models with and without a
backdoor one is found. scans.png has the ROC curves.

Exit status: 0 done, 2 a mistake that you can correct, 75 stopped by SIGTERM (saved; the same command continues), 130
interrupted.
"""

import argparse
import json
import sys
from typing import Any

from aft_jax import cli, files
from aft_jax.analysis import scan_stage, scan_table
from aft_jax.config import UNPURIFIED
from aft_jax.errors import user_path
from aft_jax.pipeline import saved_run
from aft_jax.report import requirements, scan_figure
from aft_jax.results import record, table_rows
from aft_jax.results.workdir import RunFiles
from aft_jax.runtime.allocator import keep_freed_memory
from aft_jax.runtime.sharding import make_mesh


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the flags.

    Raises:
        UserError: A flag is wrong or missing.
    """
    parser = cli.Parser(prog='aft_jax.scan_runs', add_help=False)
    parser.add_argument('--runs', nargs='+', required=True)
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--defenses', default='')
    flags = parser.parse_args(arguments)
    flags.defenses = saved_run.read_defenses(flags.defenses)
    flags.runs = saved_run.read_runs(flags.runs)
    flags.workdir = user_path(flags.workdir, '--workdir')
    return flags


def scan_runs(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Scans every model of every run, and returns the rows of scans.csv.

    Raises:
        UserError: A run cannot be read back.
    """
    mesh, datasets, scanner = make_mesh(), saved_run.Datasets(), None
    rows: list[dict[str, Any]] = []
    for path in flags.runs:
        source = saved_run.load(path, mesh, datasets, flags.defenses)
        results = record.read(RunFiles(path).results)
        models = {UNPURIFIED: (source.infected.variables, results.initial)}
        models |= {name: (variables, results.purified[name]) for name, variables in source.purified.items()}
        directory = flags.workdir / path.name
        with saved_run.open_again(source, directory, mesh) as run:
            inputs = None
            for defense, (variables, scores) in models.items():
                # A scan that an earlier start has finished.
                kept = directory / f'{defense}.json'
                if not kept.exists():
                    inputs = inputs or scan_stage.prepare(run, source.scenario, source.infected, source.config)
                    count = len(inputs.images.labels)
                    scanner = scan_stage.scanner_for(source.scenario, mesh, count, source.config, scanner)
                    scan = scanner.scan(inputs, variables, purified=defense != UNPURIFIED)
                    files.write_json(kept, scan_table.rows_of(source, defense, scan, scores))
                rows += json.loads(kept.read_text())
                files.write_text(flags.workdir / 'scans.csv', table_rows.to_csv(rows, scan_table.COLUMNS))
    return rows


def main(arguments: list[str]) -> int:
    """Runs the command, and returns its exit status."""
    return cli.run(_command, __doc__, arguments)


def _command(arguments: list[str]) -> int:
    flags = parse(arguments)
    keep_freed_memory()
    models = scan_table.scanned_models(scan_runs(flags))
    if requirements.available():
        scan_figure.write(flags.workdir / 'scans.png', models)
    print(scan_table.summary(models))
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
