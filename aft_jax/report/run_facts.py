"""What the page says of how a run was made: its config and the manifest of the poison, in words and rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict


def config_rows(path: Path) -> list[tuple[str, str]]:
    """Returns the fields of a config.json as ('a.b', value); none where the file is not there."""
    if not path.exists():
        return []
    return [
        (name, _plain(value)) for name, value in sorted(flatten_dict(json.loads(path.read_text()), sep='.').items())
    ]


def manifest_rows(path: Path, class_names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Returns what a poison.npz tells, as rows; none where the file is not there.

    Args:
        path: Of the manifest.
        class_names: K names.
    """
    if not path.exists():
        return []
    with np.load(path, allow_pickle=False) as manifest:
        counts = {
            'Training images with the trigger stored in them': 'poisoned_indices',
            'Training images in cross mode (noise, or another’s trigger)': 'cross_indices',
            'Clean images that the defender holds': 'clean_indices',
        }
        rows = [(title, f'{len(manifest[name]):,}') for title, name in counts.items() if name in manifest]
        if 'target_map' in manifest and len(manifest['target_map']):
            rows.append(('What the trigger commands', commanded(manifest['target_map'], class_names)))
        made_of = [name for name in manifest.files if name.startswith('trigger_')]
        if made_of:
            shapes = [f'{name.removeprefix("trigger_")} {_shape(manifest[name])}' for name in made_of[:6]]
            more = f' and {len(made_of) - 6} more' if len(made_of) > 6 else ''
            rows.append(('Arrays of the trigger', ', '.join(shapes) + more))
    return rows


def commanded(target_map: np.ndarray, class_names: tuple[str, ...]) -> str:
    """Returns 'every class → 0', or the first few classes with theirs."""
    if (target_map == target_map[0]).all():
        return f'every class → {class_names[target_map[0]]}'
    told = [f'{class_names[k]} → {class_names[target_map[k]]}' for k in range(min(3, len(target_map)))]
    return ', '.join(told) + (', …' if len(target_map) > 3 else '')


def _shape(array: np.ndarray) -> str:
    return '×'.join(map(str, array.shape)) or f'{array:.4g}'


def _plain(value: Any) -> str:
    match value:
        case bool() | None:
            return json.dumps(value)
        case float():
            return f'{value:.6g}'
        case list():
            return ', '.join(map(_plain, value)) or '–'
    return str(value) if value != '' else '–'
