"""Prepares a data set for later runs: python launch/prepare.py NAME [DIR].

Run it once if DIR is a directory that all hosts share. Otherwise run it on every host, without DIR.
"""

import sys

from aft_jax import data
from aft_jax.config import default_config
from aft_jax.errors import UserError


def main(arguments: list[str]) -> int:
    """Prepares the data set `arguments[0]`, in the directory `arguments[1]` if given; returns the exit status."""
    if len(arguments) not in (1, 2):
        print('launch: python launch/prepare.py NAME [DIR] takes a data set and a directory.', file=sys.stderr)
        return 2
    options = default_config().data
    options.dir = arguments[1] if len(arguments) == 2 else ''
    try:
        dataset = data.load(arguments[0], options)
    except UserError as error:
        print(f'launch: {error}', file=sys.stderr)
        return 2
    print(f'{arguments[0]}: {len(dataset.train_images)} + {len(dataset.test_images)} images are ready.')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
