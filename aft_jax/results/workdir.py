"""The work directory: who it belongs to, and files that are whole or absent."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_collections
from flax.traverse_util import flatten_dict

from aft_jax.errors import UserError
from aft_jax.files import write_json

# Fields that a later start may change in the same directory: how the work is done and how much of it.
FREE_FIELDS = ('run', 'stages', 'defenses', 'data.dir', 'data.idx_dir')
# What the defender holds, and how it tunes itself: open until the first defense begins.
SHARED_BY_DEFENSES = ('clean_share', 'tuning')


def claim(
    workdir: Path,
    config: ml_collections.ConfigDict,
    data_checksum: int,
    writes: bool = True,
    defenses: Iterable[str] = (),
) -> None:
    """Makes the work directory this experiment's, or finds that it is already.

    Args:
        workdir: The directory; made when it is not there.
        config: The resolved config, kept as config.json.
        data_checksum: Of the data set's arrays, and of a model that init_from names, kept with it, so that other
            contents under the same name are noticed.
        writes: Whether this process writes; the others only check.
        defenses: Names of sections of the config that may still change while that defense has not begun here, as
            `clean_share` and `tuning` may while none has.

    Raises:
        UserError: The directory cannot be written, holds another experiment, or holds files that are not ours.
    """
    path = workdir / 'config.json'
    wanted = json.loads(json.dumps(config.to_dict() | {'data_checksum': data_checksum}))
    try:
        if writes:
            workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _check_same(path, wanted, _not_begun(workdir, defenses))
        # A process that died while it first wrote config.json leaves a temporary file.
        elif writes and any(not file.name.startswith(f'.{path.name}.') for file in workdir.iterdir()):
            raise UserError(
                f'--workdir={workdir} holds other files but no config.json; name an empty or a new directory.'
            )
        if writes:
            write_json(path, wanted)
    except OSError as error:
        raise UserError(f'--workdir={workdir} cannot be written ({error.strerror}); name another directory.') from error


def differences(workdir: Path, config: ml_collections.ConfigDict, defenses: Iterable[str] = ()) -> list[str]:
    """Returns the fields, as 'a.b', in which a directory's config.json is of another experiment than `config`.

    Args:
        workdir: The directory.
        config: The resolved config.
        defenses: As for `claim`.

    Raises:
        OSError, ValueError: There is no config.json, or a damaged one.
    """
    kept = flatten_dict(json.loads((workdir / 'config.json').read_text()), sep='.')
    return _differing(
        kept, flatten_dict(json.loads(json.dumps(config.to_dict())), sep='.'), _not_begun(workdir, defenses)
    )


def _not_begun(workdir: Path, defenses: Iterable[str]) -> set[str]:
    purified = workdir / 'checkpoints' / 'purify'
    shared = set() if purified.exists() else set(SHARED_BY_DEFENSES)
    return shared | {name for name in defenses if not (purified / name).exists()}


def _differing(found: dict[str, Any], asked: dict[str, Any], open_sections: Iterable[str]) -> list[str]:
    free = {*FREE_FIELDS, 'data_checksum', *open_sections}
    # A text that is absent is as an empty one: the directory is older than the field.
    return [
        name
        for name in sorted(found.keys() | asked.keys(), key=lambda name: (name not in asked or name not in found, name))
        if not {name, name.split('.')[0]} & free and found.get(name, '') != asked.get(name, '')
    ]


def _check_same(path: Path, wanted: dict, open_sections: Iterable[str]) -> None:
    try:
        found = flatten_dict(json.loads(path.read_text()), sep='.')
    except (json.JSONDecodeError, AssertionError, UnicodeDecodeError):
        raise UserError(
            f'{path} is damaged, so it cannot be told whose work this is; name another --workdir.'
        ) from None
    asked = flatten_dict(wanted, sep='.')
    if found.get('data_checksum') != asked['data_checksum'] and found.get('dataset') == asked['dataset']:
        model = ', or the model of init_from,' if asked['init_from'] else ''
        raise UserError(
            f'the data of {asked["dataset"]}{model} are not those that --workdir={path.parent} was made with; name '
            'another directory, or bring back the old ones.'
        )
    if differing := _differing(found, asked, open_sections):
        shown = ', '.join(f'{name} is {found.get(name)!r} there and {asked.get(name)!r} here' for name in differing[:3])
        more = f' and {len(differing) - 3} more fields differ' if len(differing) > 3 else ''
        raise UserError(
            f'--workdir={path.parent} belongs to another config ({shown}{more}); name another directory, '
            'or repeat the config it was made with.'
        )
