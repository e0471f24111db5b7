"""The command: run one experiment.

python -m aft_jax.main --config=configs/quickstart.py --workdir=runs/quickstart [--config.attack.name=blend ...]
"""

import logging
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from aft_jax.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/; any field can be overridden.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where results and checkpoints go; the same one resumes.')


def main(arguments: list[str]) -> int:
    """Runs one experiment and prints its table; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    logging.getLogger('absl').setLevel(logging.ERROR)
    try:
        _parse(arguments)
        # After the flags, so that a wrong one is told at once.
        from aft_jax import results
        from aft_jax.experiment import run_experiment

        workdir = Path(_WORKDIR.value).expanduser()
        print(results.table(run_experiment(_CONFIG.value, workdir)))
        print(f'\nResults, pictures and checkpoints are in {workdir}')
    except UserError as error:
        print(f'aft_jax: {error}', file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print('aft_jax: interrupted; the same command goes on from the last checkpoint.', file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _parse(arguments: list[str]) -> None:
    try:
        rest = flags.FLAGS(arguments)
    except SystemExit:
        raise
    except Exception as error:  # absl and ml_collections raise errors of many kinds, all about the command line.
        raise UserError(_sentence(error)) from error
    if rest[1:]:
        raise UserError(f'{rest[1]!r} is not a flag; fields are set as --config.FIELD=VALUE.')
    if _CONFIG.value is None:
        raise UserError('--config is missing; name a file of configs/, such as --config=configs/quickstart.py.')
    if not _WORKDIR.value:
        raise UserError('--workdir is missing; name the directory for results, such as --workdir=runs/mine.')


def _sentence(error: Exception) -> str:
    text = ' '.join(str(error.args[0] if error.args else error).split())
    return f'the command line cannot be understood: {text}' if text else f'the command line is wrong ({error!r})'


if __name__ == '__main__':
    sys.exit(main(sys.argv))
