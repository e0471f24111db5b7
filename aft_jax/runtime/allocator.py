"""Keeps freed memory for the next step; the C library gives it back to the system, which costs a quarter of a step.

XLA's CPU backend takes the temporary buffers of a computation from malloc and frees them at its end, tens of megabytes
each time. glibc asks the system for large blocks with mmap and returns them when they are freed, so every step gets
fresh pages, which the system has to clear and map one by one. With these settings the blocks come from the heap, which
keeps them. Accelerators have allocators of their own and do not notice.

Measured: docs/benchmarks.md.
"""

import ctypes
import os
import sys

# Of glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
LARGEST = 2**31 - 1
PAD_BYTES = 256 * 2**20


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep what is freed, unless the environment has settings of its own; returns whether."""
    if sys.platform != 'linux' or any(name.startswith('MALLOC_') for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is None:  # another C library
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST), (M_TOP_PAD, PAD_BYTES))
    return all([mallopt(name, value) == 1 for name, value in settings])
