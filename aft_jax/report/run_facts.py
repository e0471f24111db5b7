"""Facts about a run for its page: its config, and the poisoned images of its training set."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from aft_jax.results.workdir import flat


def config_rows(path: Path) -> list[tuple[str, str]]:
    """Lists the fields of a config.json as ('a.b', value); empty if there is no such file."""
    if not path.exists():
        return []
    return [(name, _plain(value)) for name, value in sorted(flat(json.loads(path.read_text(encoding='utf-8'))).items())]


def manifest_rows(path: Path, class_names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Lists the content of a poison.npz as rows of text; empty if there is no such file.

    Args:
        path: Path of the manifest.
        class_names: Names of the K classes.
    """
    if not path.exists():
        return []
    with np.load(path, allow_pickle=False) as manifest:
        counts = {
            'Training images with the trigger stored in them': 'poisoned_indices',
            'Training images in cross mode (noise, or another’s trigger)': 'cross_indices',
            'Clean images of the defender': 'clean_indices',
        }
        rows = [(title, f'{len(manifest[name]):,}') for title, name in counts.items() if name in manifest]
        if 'target_map' in manifest and len(manifest['target_map']):
            rows.append(('Target labels of the trigger', target_labels(manifest['target_map'], class_names)))
        arrays = [name for name in manifest.files if name.startswith('trigger_')]
        if arrays:
            shapes = [f'{name.removeprefix("trigger_")} {_shape(manifest[name])}' for name in arrays[:6]]
            more = f' and {len(arrays) - 6} more' if len(arrays) > 6 else ''
            rows.append(('Arrays of the trigger', ', '.join(shapes) + more))
    return rows


def target_labels(target_map: np.ndarray, class_names: tuple[str, ...]) -> str:
    """Formats the target labels as 'every class → 0', or as the first few classes with theirs."""
    if (target_map == target_map[0]).all():
        return f'every class → {class_names[target_map[0]]}'
    pairs = [f'{class_names[k]} → {class_names[target_map[k]]}' for k in range(min(3, len(target_map)))]
    return ', '.join(pairs) + (', …' if len(target_map) > 3 else '')


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
