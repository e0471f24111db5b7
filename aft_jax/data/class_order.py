"""The order of the classes of a folder of pictures: which output of a network stands for which sub-folder."""

import json
from pathlib import Path

from aft_jax.errors import UserError, suggestion, user_path

NUMERIC = 'numeric'


def class_order(folders: list[str], setting: str) -> tuple[str, ...]:
    """Orders the classes, which may be more than the sub-folders.

    Args:
        folders: Names of the sub-folders, sorted as text.
        setting: '' for this order, 'numeric' for the order of their numbers, or the path of a file. The file is a text
            with the name of one class in each line, or JSON: a list of names, or an object {name: index}.

    Returns:
        Names of the classes, in the order of the labels.

    Raises:
        UserError: The file cannot be read or lacks a sub-folder, or a sub-folder is no number.
    """
    if not setting:
        return tuple(folders)
    if setting == NUMERIC:
        if others := [name for name in folders if not name.isdecimal()]:
            raise UserError(f'data.classes=numeric: the folder {others[0]!r} is no number; name a file of class names.')
        return tuple(sorted(folders, key=int))
    names = _read(user_path(setting, 'data.classes'))
    if len(set(names)) < len(names):
        raise UserError(f'data.classes={setting} has a class twice; each class needs one line.')
    if missing := [name for name in folders if name not in names]:
        raise UserError(f'data.classes={setting} lacks the folder {missing[0]!r}.{suggestion(missing[0], names)}')
    return names


def _read(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding='utf-8')
        content = json.loads(text) if path.suffix == '.json' else [line for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or 'it is not text, or not JSON'
        raise UserError(f'data.classes={path} cannot be read ({reason}).') from error
    if isinstance(content, dict):
        if sorted(content.values(), key=str) != sorted(range(len(content)), key=str):
            raise UserError(f'data.classes={path} must give the classes the indices 0, 1, 2, ..., each once.')
        content = sorted(content, key=content.__getitem__)
    if not isinstance(content, list) or len(content) < 2 or not all(isinstance(name, str) for name in content):
        raise UserError(f'data.classes={path} must have the names of two classes or more.')
    return tuple(name.strip() for name in content)
