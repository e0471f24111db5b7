"""Run one experiment: infect a classifier, purify it, show both.

    python -m aft_jax.main --config=configs/quickstart.py --workdir=runs/quickstart [--config.FIELD=VALUE ...]

    --config          a file of configs/, or one of your own like them
    --workdir         where results, pictures and checkpoints go; the same command again goes on from there
    --config.FIELD    sets any field of the config, such as --config.attack.name=sig --config.defenses=aft,ft
                      (aft_jax/config.py has them all, with what they mean)

Many accelerators need nothing more. For several processes that work as one, start the same command in each, with

    --distributed     on a TPU pod, SLURM or Kubernetes; elsewhere with --coordinator=HOST:PORT --num_processes=N
                      --process_id=I as well (launch/README.md)

Exit status: 0 done, 2 something that you can put right, 75 told to stop by SIGTERM (saved; the same command goes on),
130 interrupted.
"""

import logging
import sys
import traceback

from absl import flags
from ml_collections import config_flags

from aft_jax.cli import EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_USER_ERROR, complain, parse
from aft_jax.config import default_config
from aft_jax.errors import UserError, user_path
from aft_jax.runtime.allocator import keep_freed_memory

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/; any field can be overridden.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where results and checkpoints go; the same one resumes.')
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'This is one of several processes that work as one.')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0.')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes there are.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which one this is, from 0.')


def main(arguments: list[str]) -> int:
    """Runs one experiment and prints its table; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    logging.getLogger('absl').setLevel(logging.CRITICAL)  # Orbax tells of damage in many lines; we in one
    if {'--help', '-h', '--helpfull'} & set(arguments):
        print(__doc__)
        return 0
    try:
        parse(arguments, flags.FLAGS, default_config())
    except UserError as error:
        return complain(error)
    keep_freed_memory()
    # After the flags, so that a wrong one is told at once.
    from aft_jax.runtime import processes

    joined = False
    try:
        if _DISTRIBUTED.value:
            processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
            joined = True
        elif _COORDINATOR.value or _NUM_PROCESSES.value is not None or _PROCESS_ID.value is not None:
            raise UserError('--coordinator, --num_processes and --process_id need --distributed.')
        return run()
    except UserError as error:
        if processes.should_print(error):
            complain(error)
        if joined and not error.shared:
            processes.hard_exit(EXIT_USER_ERROR)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print('aft_jax: interrupted; the same command goes on from the last checkpoint.', file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception:
        if not joined:
            raise
        traceback.print_exc()
        processes.hard_exit(1)


def run() -> int:
    """Runs the experiment of the flags; returns the exit status."""
    import jax

    from aft_jax.experiment import run_experiment
    from aft_jax.results import terminal
    from aft_jax.runtime.preemption import Preempted

    workdir = user_path(str(_WORKDIR.value), '--workdir')
    speaks = jax.process_index() == 0
    try:
        outcome = run_experiment(_CONFIG.value, workdir)
    except Preempted:
        if speaks:
            print('aft_jax: told to stop; all is saved, and the same command goes on.', file=sys.stderr)
        return EXIT_PREEMPTED
    if speaks:
        print(terminal.table(outcome))
        print(f'\nResults, pictures and checkpoints are in {workdir}')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
