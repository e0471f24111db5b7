"""Atomic writing: after a crash a file has its old content or the new one, never a part."""

import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically: a reader finds the old content or the new one, never a part."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f'.{path.name}.', delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def write_text(path: Path, content: str) -> None:
    """Writes text atomically."""
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + '\n')


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a compressed .npz file atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)  # type: ignore[arg-type]  # names are not options
    write_bytes(path, buffer.getvalue())
