"""Renders the CSV file of benchmarks.compare as Markdown, with the last row of each benchmark and baseline.

python -m benchmarks.table [FILE.csv]          # docs/results/benchmarks.csv
"""

import csv
import sys
from pathlib import Path

from aft_jax.cli import complain
from aft_jax.errors import UserError, user_path
from benchmarks.record import COLUMNS

DEFAULT = 'docs/results/benchmarks.csv'
HEADING = '| Benchmark | Batch | dtype | Baseline | Ours, s | Theirs, s | Theirs / ours [min, max] | Turns |'


def read(path: Path) -> list[dict[str, str]]:
    """Reads the rows of the file.

    Raises:
        UserError: If the file does not exist, or is no table of benchmarks.compare.
    """
    try:
        with path.open(newline='') as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, ValueError) as error:
        raise UserError(f'{path} cannot be read; give a file that benchmarks.compare wrote.') from error
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise UserError(f'{path} has other columns; give a file that benchmarks.compare wrote.')
    return rows


def markdown(rows: list[dict[str, str]]) -> str:
    """Formats a table for each day, device and versions."""
    last = {}
    for row in rows:
        # A later variant of `tuned` replaces an earlier one.
        same = (row['device'], row['versions'], row['benchmark'], row['dtype'], row['batch'])
        last[*same, row['baseline'].partition(',')[0]] = row
    blocks: dict[str, list[str]] = {}
    for row in last.values():
        title = f'{row["date"]}, {row["device"]}; {row["versions"]}'
        spread = f'**{row["ratio_median"]}** [{row["ratio_min"]}, {row["ratio_max"]}]'
        named = [row[field] for field in ('benchmark', 'batch', 'dtype', 'baseline', 'ours_seconds', 'theirs_seconds')]
        blocks.setdefault(title, []).append(f'| {" | ".join([*named, spread, row["alternations"]])} |')
    rule = '|' + ' --- |' * (HEADING.count('|') - 1)
    return '\n\n'.join('\n'.join([f'{title}\n', HEADING, rule, *lines]) for title, lines in blocks.items())


def main(arguments: list[str]) -> int:
    """Prints the tables; returns the exit status."""
    if {'--help', '-h'} & set(arguments):
        print(__doc__)
        return 0
    try:
        print(markdown(read(user_path(arguments[0] if arguments else DEFAULT, 'the file'))))
    except UserError as error:
        return complain(error)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
