"""Settings of JAX that change numbers: those of random numbers are fixed here, and others are recorded.

JAX takes these settings from environment variables too, such as JAX_DEFAULT_PRNG_IMPL=rbg, which is common on TPUs.
With other random numbers a run has other results, and a resumed run would change them in the middle.
"""

import logging
import os
from typing import Any

import jax

log = logging.getLogger(__name__)
# The values that every run has. They are JAX's defaults.
PINNED: dict[str, Any] = {
    'jax_default_prng_impl': 'threefry2x32',
    'jax_threefry_partitionable': True,
    'jax_enable_x64': False,
    'jax_random_seed_offset': 0,
    'jax_high_dynamic_range_gumbel': False,
}
# Beginnings of XLA's flags that change no number: the number of virtual devices, and what is written for debugging.
HARMLESS_FLAGS = ('--xla_force_host_platform_device_count', '--xla_dump')
# The recorded settings: the environment variable of each, and the value that it has by default.
VARIABLES = {'matmul_precision': 'JAX_DEFAULT_MATMUL_PRECISION', 'xla_flags': 'XLA_FLAGS'}
DEFAULTS = {'matmul_precision': 'default', 'xla_flags': ''}


def pin() -> None:
    """Sets JAX's settings of random numbers and of 64-bit types to PINNED, with a warning if one was different."""
    for name, value in PINNED.items():
        current = jax.config.values[name]
        if current != value:
            log.warning('%s=%s is ignored: results need %s.', name.upper(), current, value)
            jax.config.update(name, value)


def recorded() -> dict[str, str]:
    """Collects the settings that change numbers and that the user may choose; a resumed run must have the same ones."""
    flags = [flag for flag in os.environ.get('XLA_FLAGS', '').split() if not flag.startswith(HARMLESS_FLAGS)]
    precision = jax.config.values['jax_default_matmul_precision']
    return {'matmul_precision': str(precision or DEFAULTS['matmul_precision']), 'xla_flags': ' '.join(sorted(flags))}
