"""Command lines: parsing those with a config, and saying in one sentence what is wrong with one."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

import ml_collections
from absl import flags

from aft_jax.errors import UserError, suggestion

# Exit statuses of the commands, beside 0.
EXIT_FAILURES = 1  # some experiments of a sweep
EXIT_USER_ERROR = 2  # the user can put it right
EXIT_PREEMPTED = 75  # told to stop, and saved: EX_TEMPFAIL of sysexits.h, try again
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

CONFIG_HINT = 'name a file of configs/, such as --config=configs/quickstart.py'


def parse(arguments: list[str], values: flags.FlagValues, fields: ml_collections.ConfigDict | None = None) -> None:
    """Parses flags into absl's values.

    Args:
        arguments: As sys.argv, the program's name first.
        values: The flags that there are, `config` and `workdir` among them.
        fields: A config with all the fields that --config.FIELD may name, for telling what is near a wrong one.

    Raises:
        UserError: The command line is wrong, or --config or --workdir is missing.
    """
    # ml_collections reports a config file that it cannot load only when the config is first used.
    for argument in arguments[1:]:
        flag, _, value = argument.lstrip('-').partition('=')
        if flag == 'config' and value and not Path(value.partition(':')[0]).is_file():
            raise UserError(f'--config={value} does not exist; {CONFIG_HINT}.')
    try:
        rest = values(arguments)
    except Exception as error:  # absl and ml_collections raise errors of many kinds, all about the command line.
        if fields is not None:
            _explain_unknown_field(arguments, fields)
        text = str(error.args[0] if error.args else error)
        # ml_collections hands on the whole traceback of a config file that fails.
        text = _last_line(error) if 'Traceback' in text else ' '.join(text.split())
        raise UserError(f'the command line cannot be understood: {text}') from error
    if rest[1:]:
        raise UserError(f'{rest[1]!r} is not a flag; fields are set as --config.FIELD=VALUE.')
    try:
        config = values.config
    except Exception as error:  # Whatever running the user's config file raised.
        raise UserError(f'the config file cannot be run: {_last_line(error)}') from error
    if config is None:
        raise UserError(f'--config is missing; {CONFIG_HINT}.')
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError('the config file must have a get_config() that returns an ml_collections.ConfigDict.')
    if not values.workdir:
        raise UserError('--workdir is missing; name the directory for results, such as --workdir=runs/mine.')


class Parser(argparse.ArgumentParser):
    """For the commands without a config; says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raises the user's mistake."""
        raise UserError(f'the command line cannot be understood: {message}.')


def complain(error: UserError) -> int:
    """Prints a user's mistake and returns the exit status for it."""
    print(f'aft_jax: {error}', file=sys.stderr)
    return EXIT_USER_ERROR


def _explain_unknown_field(arguments: list[str], fields: ml_collections.ConfigDict) -> None:
    for argument in arguments[1:]:
        flag = argument.lstrip('-').partition('=')[0]
        if not flag.startswith('config.'):
            continue
        node = fields
        for depth, part in enumerate(names := flag.split('.')[1:]):
            if not isinstance(node, ml_collections.ConfigDict):
                raise UserError(f'--{flag}: config.{".".join(names[:depth])} is a value and has no fields.')
            if part not in node:
                there = sorted(node.keys())
                raise UserError(
                    f'--{flag}: there is no field {part!r} in {".".join(["config", *names[:depth]])}; it has '
                    f'{", ".join(there)}.{suggestion(part, there)}'
                )
            node = node[part]


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
