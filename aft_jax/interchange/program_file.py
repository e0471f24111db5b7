"""The .pt2 file of `torch.export.save`: a zip archive with the graph as JSON and the weights as raw bytes.

This module reads and writes it without torch. torch's own loader would also unpickle parts of the archive, such as the
sample inputs, which could run code. Here they are only copied.

Source: torch/export/pt2_archive and torch/_export/serde/schema.py of torch 2.13 (schema version 8).
"""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aft_jax.errors import UserError
from aft_jax.interchange.convert import BFLOAT16

GRAPH, WEIGHTS, CONSTANTS = 'models/model.json', 'data/weights/', 'data/constants/'
WEIGHTS_INDEX, CONSTANTS_INDEX = f'{WEIGHTS}model_weights_config.json', f'{CONSTANTS}model_constants_config.json'
SCHEMA = 8
# Numbers of torch's dtypes in the schema.
DTYPES = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float16),
    7: np.dtype(np.float32),
    8: np.dtype(np.float64),
    12: np.dtype(np.bool_),
    13: BFLOAT16,
}


class ProgramFile(NamedTuple):
    """Content of a .pt2 file.

    Attributes:
        path: Path of the file, for messages; empty for a program that has no file yet.
        folder: Folder of the archive that contains everything, with a slash, or ''.
        entries: Content of the archive by name.
        graph: Content of the graph's JSON file.
        tensors: Parameters and buffers by their keys in the state dict.
        constants: Other tensors of the graph by name.
    """

    path: Path
    folder: str
    entries: dict[str, bytes]
    graph: dict[str, Any]
    tensors: dict[str, np.ndarray]
    constants: dict[str, np.ndarray]


def read(path: Path) -> ProgramFile:
    """Reads a .pt2 file.

    Raises:
        UserError: If the file is missing, damaged, of another kind, or of another version.
    """
    if path.is_dir():
        raise UserError(f'{path} is a directory; name a .pt2 file.')
    try:
        return decode(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}).') from error


def decode(content: bytes, path: Path = Path()) -> ProgramFile:
    """Decodes the content of a .pt2 file; `path` is for messages.

    Raises:
        UserError: If the content is damaged, of another kind, or of another version.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        folder = next((name.removesuffix(GRAPH) for name in entries if name.endswith(GRAPH)), None)
        if folder is None:
            raise UserError(
                f'{path} holds no graph of torch.export under the name "model"; save it by torch.export.save of '
                'torch 2.9 or newer.'
            )
        graph = json.loads(entries[folder + GRAPH])
        if graph['schema_version']['major'] != SCHEMA:
            raise UserError(
                f'{path} has version {graph["schema_version"]["major"]} of the format of torch.export, not {SCHEMA}; '
                'save it again with torch 2.13.'
            )
        tensors = _tensors(entries, folder + WEIGHTS, folder + WEIGHTS_INDEX, path)
        constants = _tensors(entries, folder + CONSTANTS, folder + CONSTANTS_INDEX, path)
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, EOFError) as error:
        raise UserError(f'{path} is damaged, cut short, or not a file of torch.export.save.') from error
    return ProgramFile(path, folder, entries, graph, tensors, constants)


def encode(file: ProgramFile, tensors: Mapping[str, np.ndarray]) -> bytes:
    """Encodes the file with other values of its tensors, which keep their keys, shapes and dtypes."""
    index = json.loads(file.entries[file.folder + WEIGHTS_INDEX])['config']
    storages = {
        meta['path_name']: bytearray(file.entries[f'{file.folder}{WEIGHTS}{meta["path_name"]}'])
        for meta in index.values()
    }
    for key, meta in index.items():
        view = _view(storages[meta['path_name']], meta['tensor_meta'])
        view[...] = tensors[key].astype(view.dtype)
    changed = {f'{file.folder}{WEIGHTS}{name}': bytes(content) for name, content in storages.items()}
    return pack(file.entries | changed)


def pack(entries: Mapping[str, bytes]) -> bytes:
    """Packs an archive. Its date is fixed, so that equal models give equal files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def _tensors(entries: Mapping[str, bytes], folder: str, index: str, path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors that an index of the archive lists."""
    tensors = {}
    for key, meta in json.loads(entries[index])['config'].items():
        if meta['use_pickle'] or not meta.get('tensor_meta'):
            raise UserError(
                f'{key} of {path} is pickled, and unpickling could run code; save a model of plain tensors.'
            )
        tensors[key] = _view(entries[folder + meta['path_name']], meta['tensor_meta']).copy()
    return tensors


def _view(storage: bytes | bytearray, meta: Mapping[str, Any]) -> np.ndarray:
    """Views a tensor in its storage.

    Raises:
        ValueError: If it does not lie within the storage, or has a dtype that NumPy lacks.
    """
    if meta['dtype'] not in DTYPES:
        raise ValueError(f'dtype {meta["dtype"]}')
    dtype = DTYPES[meta['dtype']]
    sizes, strides = ([int(entry['as_int']) for entry in meta[name]] for name in ('sizes', 'strides'))
    offset = int(meta['storage_offset']['as_int'])
    if 0 in sizes:
        return np.zeros(sizes, dtype)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if min([offset, *strides, *sizes]) < 0 or (last + 1) * dtype.itemsize > len(storage):
        raise ValueError('outside of its storage')
    return np.ndarray(sizes, dtype, storage, offset * dtype.itemsize, [stride * dtype.itemsize for stride in strides])
