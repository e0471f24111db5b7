"""The allocator settings: freed memory stays with the process."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from aft_jax.runtime import allocator

BLOCK_BYTES = 2**26
# Prints the bytes that malloc keeps for later after a block was freed: `fordblks` of glibc's mallinfo2.
FREE_BYTES = f"""
import ctypes, sys
from aft_jax.runtime.allocator import keep_freed_memory
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in 'arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost'.split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.free.argtypes = Info, ctypes.c_void_p, [ctypes.c_void_p]
if sys.argv[1] == 'kept':
    assert keep_freed_memory()
libc.free(libc.malloc({BLOCK_BYTES}))
print(libc.mallinfo2().fordblks)
"""  # noqa: E501
HAS_MALLINFO = platform.libc_ver()[0] == 'glibc' and hasattr(ctypes.CDLL(None), 'mallinfo2')


@pytest.mark.skipif(not HAS_MALLINFO, reason='the settings are those of glibc')
def test_keep_freed_memory_keeps_a_freed_block():
    environment = {name: value for name, value in os.environ.items() if not name.startswith('MALLOC_')}
    kept, returned = (
        int(subprocess.check_output([sys.executable, '-c', FREE_BYTES, how], env=environment))
        for how in ('kept', 'default')
    )
    assert kept >= BLOCK_BYTES > returned


def test_keep_freed_memory_respects_the_environment(monkeypatch):
    monkeypatch.setenv('MALLOC_ARENA_MAX', '2')
    assert not allocator.keep_freed_memory()
