"""The model card of a purified model, in JSON for programs and in Markdown for people."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aft_jax.errors import UserError
from aft_jax.files import write_json, write_text
from aft_jax.interchange.state_file import checksum

TITLE = 'Model card'


def write_card(path: Path, facts: Mapping[str, Any], before: Path, after: Path) -> tuple[Path, Path]:
    """Writes a model card as JSON and as Markdown.

    Args:
        path: Path of the card. Its suffix is replaced by .json and .md.
        facts: Facts about the purification as plain values for JSON, in sections of {name: value}. A section of
            {name: {column: value}}, such as {'figures': {'acc': {'before': 0.93, 'after': 0.92}}}, becomes a table.
        before: File of the model before the purification.
        after: File of the purified model. The names and sha256 of both are added as the section 'files'.

    Returns:
        The paths of the two files.

    Raises:
        UserError: A file cannot be read or written.
    """
    json_path, markdown_path = path.with_suffix('.json'), path.with_suffix('.md')
    try:
        paths = {'before': before, 'after': after}
        files = {role: {'name': file.name, 'sha256': checksum(file)} for role, file in paths.items()}
        card = {**facts, 'files': files}
        write_json(json_path, card)
        write_text(markdown_path, to_markdown(card))
    except OSError as error:
        raise UserError(
            f'{error.filename}: {error.strerror}, so the model card cannot be written; start the run again.'
        ) from error
    return json_path, markdown_path


def to_markdown(card: Mapping[str, Any]) -> str:
    """Formats a card as Markdown: single values as a list, and each section as a list or table under its heading."""
    lines = [f'# {_text(card.get("title", TITLE))}', '']
    single = {name: value for name, value in card.items() if not isinstance(value, Mapping) and name != 'title'}
    sections = {name: value for name, value in card.items() if isinstance(value, Mapping)}
    lines += [*_list(single), ''] if single else []
    for name, section in sections.items():
        rows = {key: value for key, value in section.items() if isinstance(value, Mapping)}
        single = {key: value for key, value in section.items() if key not in rows}
        lines += [f'## {_text(name).capitalize()}', '']
        lines += [*_list(single), ''] if single else []
        lines += [*_table(rows), ''] if rows else []
    return '\n'.join(lines)


def _list(values: Mapping[str, Any]) -> list[str]:
    return [f'- {_text(name)}: {_text(value)}' for name, value in values.items()]


def _table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [['', *columns], ['---'] * (len(columns) + 1)]
    lines += [[name, *(row.get(column, '') for column in columns)] for name, row in rows.items()]
    return ['| ' + ' | '.join(_text(cell) for cell in line) + ' |' for line in lines]


def _text(value: Any) -> str:
    """Formats a value on one line, and escapes what Markdown would read as a table or as HTML."""
    match value:
        case float():
            text = f'{value:.6g}'
        case list() | tuple():
            text = ', '.join(map(str, value))
        case _:
            text = str(value)
    return ' '.join(text.split()).replace('|', '\\|').replace('<', '&lt;')
