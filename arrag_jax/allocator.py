"""The C library's memory allocator, in programs that answer for days."""

import ctypes
import sys

ARENA_MAX = -8  # M_ARENA_MAX of malloc.h


def share_one_arena() -> None:
    """Lets all threads that begin from now on allocate from one heap; does nothing without glibc.

    glibc otherwise makes a heap for each of up to 8 threads per core. A large block that one thread frees serves no
    other thread, so that the memory of a server grows for as long as different threads happen to allocate.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "gnu_get_libc_version"):
        library.mallopt(ARENA_MAX, 1)
