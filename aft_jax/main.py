"""Runs one experiment: infects a classifier, purifies it, and shows both.

    python -m aft_jax.main --config=configs/quickstart.py --workdir=runs/quickstart [--config.FIELD=VALUE ...]

    --config          a file of configs/, or one of your own like them
    --workdir         directory for results, pictures and checkpoints; the same command again continues from there
    --config.FIELD    sets any field of the config, such as --config.attack.name=sig --config.defenses=aft,ft
    --help-config     prints all fields with their defaults, meanings and choices

Many accelerators need nothing more. For several processes that work as one, start the same command in each, with

    --distributed     on a TPU pod, SLURM or Kubernetes; elsewhere with --coordinator=HOST:PORT --num_processes=N
                      --process_id=I as well (launch/README.md)

Exit status: 0 done, 2 a mistake that you can correct, 75 stopped by SIGTERM (saved; the same command continues),
130 interrupted.
"""

import sys
import traceback

from absl import flags
from ml_collections import config_flags

from aft_jax import cli
from aft_jax.config import default_config
from aft_jax.errors import Preempted, UserError, user_path
from aft_jax.runtime.allocator import keep_freed_memory

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/; any field can be overridden.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory for results and checkpoints; the same one resumes.')
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Whether this is one of several processes of a job.')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0.')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Number of processes.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Index of this process, from 0.')


def main(arguments: list[str]) -> int:
    """Runs the command, and returns its exit status. `arguments` is like sys.argv."""
    return cli.run(_command, __doc__, arguments)


def _command(arguments: list[str]) -> int:
    if '--help-config' in arguments:
        from aft_jax.validation.config_help import config_help

        print(config_help())
        return 0
    cli.parse(arguments, flags.FLAGS, default_config())
    keep_freed_memory()
    if _DISTRIBUTED.value:
        return _run_distributed()
    if _COORDINATOR.value or _NUM_PROCESSES.value is not None or _PROCESS_ID.value is not None:
        raise UserError('--coordinator, --num_processes and --process_id need --distributed.')
    return _run()


def _run() -> int:
    """Runs the experiment of the flags, and prints its table from process 0."""
    import jax

    from aft_jax.experiment import run_experiment
    from aft_jax.results import terminal

    workdir = user_path(str(_WORKDIR.value), '--workdir')
    outcome = run_experiment(_CONFIG.value, workdir)
    if jax.process_index() == 0:
        print(f'Results, pictures and checkpoints are in {workdir}\n')
        # The last line is the verdict of the search for triggers, if there was one.
        print(terminal.table(outcome))
    return 0


def _run_distributed() -> int:
    """Joins the job's processes and runs the experiment. What ends all of them is printed by process 0 alone."""
    import jax

    from aft_jax.runtime import processes

    processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    try:
        return _run()
    except UserError as error:
        if not error.shared:
            processes.hard_exit(cli.complain(error))
        if processes.should_print(error):
            raise
        return cli.EXIT_USER_ERROR
    except Preempted:
        if jax.process_index() == 0:
            raise
        return cli.EXIT_PREEMPTED
    except Exception:
        traceback.print_exc()
        processes.hard_exit(1)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
