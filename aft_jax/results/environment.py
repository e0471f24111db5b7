"""The versions and devices of a start, which results.json records."""

from typing import Any

import jax
from jax.sharding import Mesh


def environment(mesh: Mesh) -> dict[str, Any]:
    """Collects JAX's version and backend, and the numbers of devices and processes."""
    return {
        'jax': jax.__version__,
        'backend': jax.default_backend(),
        'devices': mesh.size,
        'processes': jax.process_count(),
    }
