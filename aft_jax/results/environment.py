"""The versions and devices of a start, which results.json records."""

from typing import Any

import jax
from jax.sharding import Mesh

from aft_jax.runtime import numerics


def environment(mesh: Mesh) -> dict[str, Any]:
    """Collects JAX's version and backend, the numbers of devices and processes, and the settings of the numbers."""
    return {
        'jax': jax.__version__,
        'backend': jax.default_backend(),
        'devices': mesh.size,
        'processes': jax.process_count(),
        'numerics': {name.removeprefix('jax_'): jax.config.values[name] for name in numerics.PINNED}
        | numerics.recorded(),
    }
