"""Run one experiment: infect a classifier, purify it, show both.

    python -m aft_jax.main --config=configs/quickstart.py --workdir=runs/quickstart [--config.FIELD=VALUE ...]

    --config          a file of configs/, or one of your own like them
    --workdir         where results, pictures and checkpoints go; the same command again goes on from there
    --config.FIELD    sets any field of the config, such as --config.attack.name=sig --config.defenses=aft,ft
                      (aft_jax/config.py has them all, with what they mean)

Exit status: 0 done, 2 something that you can put right, 130 interrupted.
"""

import logging
import sys

from absl import flags
from ml_collections import config_flags

from aft_jax.command_line import parse
from aft_jax.config import default_config
from aft_jax.errors import UserError, user_path

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/; any field can be overridden.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where results and checkpoints go; the same one resumes.')


def main(arguments: list[str]) -> int:
    """Runs one experiment and prints its table; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    logging.getLogger('absl').setLevel(logging.CRITICAL)  # Orbax tells of damage in many lines; we in one
    if {'--help', '-h', '--helpfull'} & set(arguments):
        print(__doc__)
        return 0
    try:
        parse(arguments, flags.FLAGS, default_config())
        # After the flags, so that a wrong one is told at once.
        from aft_jax import results
        from aft_jax.experiment import run_experiment

        workdir = user_path(str(_WORKDIR.value), '--workdir')
        print(results.table(run_experiment(_CONFIG.value, workdir)))
        print(f'\nResults, pictures and checkpoints are in {workdir}')
    except UserError as error:
        print(f'aft_jax: {error}', file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print('aft_jax: interrupted; the same command goes on from the last checkpoint.', file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
