"""Freed memory stays with the process: the system is not asked for the same pages twice."""

import os
import platform
import subprocess
import sys

import pytest

from aft_jax.runtime import allocator

# Page faults of the second of two blocks of 64 MiB, of which the first was freed.
FAULTS = """
import resource, sys
import numpy as np
from aft_jax.allocator import keep_freed_memory
if sys.argv[1] == 'kept':
    assert keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(2**26, np.uint8).fill(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='the settings are those of glibc')
def test_a_freed_block_is_used_again():
    environment = {name: value for name, value in os.environ.items() if not name.startswith('MALLOC_')}
    kept, returned = (
        int(subprocess.check_output([sys.executable, '-c', FAULTS, how], env=environment)) for how in ('kept', 'as is')
    )
    # 32 pages of 2 MiB where the system gives huge ones, 16,384 of 4 KiB where it does not.
    assert kept < 10 and returned >= 32


def test_settings_of_the_users_own_stay(monkeypatch):
    monkeypatch.setenv('MALLOC_ARENA_MAX', '2')
    assert not allocator.keep_freed_memory()
