"""Prints one table of finished runs as CSV: a row for each run and defense, `none` for the model before purification.

    python -m aft_jax.results runs/fashion/* > table.csv

The arguments are the work directories of the runs. Shares are in 0..1, times in seconds.

Exit status: 0 done, 2 a mistake that you can correct.
"""

import errno
import sys

from aft_jax import cli
from aft_jax.errors import UserError, user_path
from aft_jax.results import table_rows


def main(arguments: list[str]) -> int:
    """Runs the command, and returns its exit status."""
    return cli.run(_command, __doc__, arguments)


def _command(arguments: list[str]) -> int:
    parser = cli.Parser(prog='aft_jax.results', add_help=False)
    parser.add_argument('runs', nargs='+')
    workdirs = [user_path(text, 'RUN') for text in parser.parse_args(arguments).runs]
    print(table_rows.to_csv(table_rows.read(workdirs)), end='', flush=True)
    error = getattr(sys.stdout, 'error', None)
    if error is not None and error.errno != errno.EPIPE:  # EPIPE: the reader, such as head, has enough
        raise UserError(f'the table cannot be written to the standard output ({error.strerror}).')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
