"""Starts `aft_jax.main` for tests, in this process or in one of its own."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from absl import flags

from aft_jax import main

ROOT = Path(__file__).parent.parent


def run_here(arguments: list[str], capsys) -> tuple[int, str]:
    """Runs the command in this process. Returns the exit status and the text of standard error."""
    flags.FLAGS.unparse_flags()
    for name in list(flags.FLAGS):
        if name in ('config', 'workdir', 'distributed', 'coordinator', 'num_processes', 'process_id'):
            flags.FLAGS[name].value = flags.FLAGS[name].default
        elif name.startswith('config.'):
            delattr(flags.FLAGS, name)
    capsys.readouterr()
    # ml_collections reads overrides from sys.argv, whatever it was given to parse.
    with mock.patch.object(sys, 'argv', ['aft_jax', *arguments]):
        status = main.main(sys.argv)
    return status, capsys.readouterr().err


def start(arguments: list[str], log: Path, **environment: str) -> subprocess.Popen:
    """Starts `python -m aft_jax.main` with one CPU device; its output goes to `log`."""
    with log.open('a') as output:
        return subprocess.Popen(
            [sys.executable, '-m', 'aft_jax.main', *arguments],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {'JAX_PLATFORMS': 'cpu'} | environment,
        )
