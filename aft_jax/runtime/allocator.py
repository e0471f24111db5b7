"""Settings of the C library's allocator that keep freed memory for the next training step.

XLA's CPU backend allocates the temporary buffers of a computation with malloc and frees them at its end, tens of
megabytes per step. By default glibc takes large blocks from the system with mmap and returns them when they are freed.
Then every step gets new pages, which the system has to clear and map. This costs a quarter of a step. With these
settings the blocks come from the heap, which keeps them. Accelerators have allocators of their own.

Measured: docs/benchmarks.md.
"""

import ctypes
import os
import sys

# Constants of glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
LARGEST = 2**31 - 1
PAD_BYTES = 256 * 2**20


def keep_freed_memory() -> bool:
    """Sets glibc's malloc to keep freed memory, unless the environment configures malloc.

    Returns:
        Whether the settings are in force.
    """
    if sys.platform != 'linux' or any(name.startswith('MALLOC_') for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is None:  # another C library
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST), (M_TOP_PAD, PAD_BYTES))
    return all([mallopt(name, value) == 1 for name, value in settings])
