"""Threads of a server share one heap."""

import subprocess
import sys

import pytest

from helpers import children

# Four threads hold a block each. glibc then tells its heaps as XML, through a FILE of its own.
THREADS = """
import ctypes, re, sys, threading
from arrag_jax.allocator import share_one_arena

library = ctypes.CDLL(None)
library.fopen.restype = library.malloc.restype = ctypes.c_void_p
library.malloc.argtypes, library.fclose.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
library.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
if sys.argv[1] == "shared":
    share_one_arena()
all_hold = threading.Barrier(5)

def hold():
    library.malloc(50_000)
    all_hold.wait()

threads = [threading.Thread(target=hold) for _ in range(4)]
for thread in threads:
    thread.start()
all_hold.wait()
file = library.fopen(sys.argv[2].encode(), b"w")
library.malloc_info(0, file)
library.fclose(file)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="arenas are glibc's")
def test_threads_share_one_heap(tmp_path):
    def heaps(how: str) -> int:
        told = tmp_path / how
        subprocess.run([sys.executable, "-c", THREADS, how, told], env=children.alone(), check=True)
        return told.read_text().count("<heap nr")

    assert heaps("shared") == 1 < heaps("own")
