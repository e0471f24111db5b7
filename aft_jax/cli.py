"""The frame of all commands: help, errors in one sentence, exit statuses, and the flags of commands with a config.

The commands import the experiment and its libraries inside their functions, after the flags are parsed. These imports
take seconds. So --help and the message about a wrong flag appear at once, and `keep_freed_memory` runs before JAX
allocates memory.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import ml_collections
from absl import flags

from aft_jax.errors import Preempted, UserError, suggestion
from aft_jax.output import tolerant

# Exit statuses of the commands, beside 0.
EXIT_FAILURES = 1  # some experiments of a sweep failed
EXIT_USER_ERROR = 2  # the user can correct it
EXIT_PREEMPTED = 75  # stopped by SIGTERM, and saved: EX_TEMPFAIL of sysexits.h, try again
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

HELP_FLAGS = {'--help', '-h', '--helpfull'}
CONFIG_HINT = 'name a file of configs/, such as --config=configs/quickstart.py'


def run(command: Callable[[list[str]], int], doc: str | None, arguments: list[str]) -> int:
    """Runs a command, and turns what may end it into a sentence on standard error and an exit status.

    Args:
        command: Function of the arguments that returns the exit status.
        doc: Help text of the command. It is printed for --help, and if there are no arguments.
        arguments: Arguments of the command line.

    Returns:
        The exit status: the command's own, or one of the EXIT_ constants.
    """
    with tolerant():
        if not arguments or HELP_FLAGS & set(arguments):
            print(doc)
            return 0 if arguments else EXIT_USER_ERROR
        return _run_explained(command, arguments)


def _run_explained(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Runs a command, and explains what ends it in a sentence. Returns the exit status."""
    _let_warnings_pass()
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    # Orbax reports a damaged checkpoint through absl in many lines; aft_jax reports it in one.
    logging.getLogger('absl').setLevel(logging.CRITICAL)
    try:
        return command(arguments)
    except UserError as error:
        return complain(error)
    except Preempted as error:
        _say(f'Stopped by {error.signal}. Everything is saved. Run the same command to continue.')
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        _say('Interrupted. Run the same command to continue from the last checkpoint.')
        return EXIT_INTERRUPTED


def complain(error: UserError) -> int:
    """Prints a mistake of the user, and returns the exit status for it."""
    _say(str(error))
    return EXIT_USER_ERROR


def _let_warnings_pass() -> None:
    """Prints warnings that PYTHONWARNINGS or -W would turn into errors, of which the libraries give some."""
    if any(option.startswith('error') for option in sys.warnoptions):
        warnings.simplefilter('default')


def _say(sentence: str) -> None:
    print(f'aft_jax: {sentence}', file=sys.stderr)


def parse(
    arguments: list[str],
    values: flags.FlagValues,
    fields: ml_collections.ConfigDict | None = None,
    title: str = 'config',
) -> None:
    """Parses flags into absl's values.

    Args:
        arguments: Arguments like sys.argv, the program's name first.
        values: The defined flags, `config` and `workdir` among them.
        fields: Config with all fields that --config.FIELD may name, to suggest the nearest one. An empty section stands
            for one whose fields only the config file knows.
        title: Name of the config in messages.

    Raises:
        UserError: The command line is wrong, or --config or --workdir is missing.
    """
    # ml_collections reports a config file that it cannot load only when the config is first used.
    for argument in arguments[1:]:
        flag, _, value = argument.lstrip('-').partition('=')
        if flag == 'config' and value and not Path(value.partition(':')[0]).is_file():
            raise UserError(f'--config={value} does not exist; {CONFIG_HINT}.')
        if flag == 'config' and value:
            _make_importable(Path(value.partition(':')[0]))
    try:
        with warnings.catch_warnings():
            # ml_collections loads config files by a method that importlib has deprecated.
            warnings.filterwarnings('ignore', 'the load_module', DeprecationWarning)
            rest = values(_last_of_each(arguments))
    except Exception as error:  # absl and ml_collections raise errors of many kinds, all about the command line.
        if fields is not None:
            _explain_unknown_field(arguments, fields, title)
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


def _make_importable(path: Path) -> None:
    """Lets a config file import its neighbours, as configs/quickstart.py does, from any current directory."""
    root = path.absolute().parent
    while (root / '__init__.py').is_file():
        root = root.parent
    if root != path.absolute().parent and str(root) not in sys.path:
        sys.path.insert(0, str(root))


def _last_of_each(arguments: list[str]) -> list[str]:
    """Removes all but the last --config.FIELD=VALUE of each field. absl would join the values of a tuple."""
    kept: dict[str, list[str]] = {}
    i = 0
    while i < len(arguments):
        name, equals, _ = arguments[i].lstrip('-').partition('=')
        is_field = arguments[i].startswith('-') and name.startswith('config.')
        # The value may be an argument of its own.
        takes_next = is_field and not equals and i + 1 < len(arguments) and not arguments[i + 1].startswith('-')
        length = 2 if takes_next else 1
        key = name if equals or takes_next else f'{i}'
        kept.pop(key if is_field else '', None)
        kept[key if is_field else f'{i}'] = arguments[i : i + length]
        i += length
    return [argument for part in kept.values() for argument in part]


class Parser(argparse.ArgumentParser):
    """An argument parser for the commands without a config, whose errors are a UserError."""

    def error(self, message: str) -> NoReturn:
        """Raises the UserError for a wrong command line."""
        raise UserError(f'the command line cannot be understood: {message}.')


def _explain_unknown_field(arguments: list[str], fields: ml_collections.ConfigDict, title: str) -> None:
    """Raises a UserError for the first --config.FIELD that does not exist."""
    for argument in arguments[1:]:
        flag = argument.lstrip('-').partition('=')[0]
        if not flag.startswith('config.'):
            continue
        node = fields
        for depth, part in enumerate(names := flag.split('.')[1:]):
            if not isinstance(node, ml_collections.ConfigDict):
                raise UserError(f'--{flag}: config.{".".join(names[:depth])} is a value and has no fields.')
            if not node:
                break
            if part not in node:
                known = sorted(node.keys())
                where = '.'.join(['config', *names[:depth]]) if depth else title
                raise UserError(
                    f'--{flag}: there is no field {part!r} in {where}; it has {", ".join(known)}.'
                    f'{suggestion(part, known)}'
                )
            node = node[part]


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
