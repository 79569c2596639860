"""Memory that a process of the command line frees stays with it, in huge pages where the kernel has them.

XLA-CPU allocates the temporary memory of a program anew at every call. glibc gives blocks above 32 MiB back to the
kernel when they are freed, and the kernel clears them page by page when they are touched again: 110,000 page faults in
a training step of MemAE (`mvtec`, 128x128, batch 16), which takes 0.65 of the time without them on two cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # M_... of glibc's malloc.h
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2 << 20
_HEAP = 4 << 30  # bytes of address space, no memory until it is touched
_is_kept = False


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep what is freed. For programs that own their process, before they start threads.

    Does nothing where JAXAD_MALLOC=off is set or the C library is another one.
    """
    global _is_kept
    if os.environ.get("JAXAD_MALLOC") == "off" or not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL(None)
        for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)):  # -1: never
            libc.mallopt(parameter, value)
    except (OSError, AttributeError):
        return
    _is_kept = True
    _ask_for_huge_pages(libc)


def give_back() -> None:
    """Gives the kernel all that is free; what is freed from now on is kept again if it was before."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        if _is_kept:
            _ask_for_huge_pages(libc)


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Grows the heap by address space that is marked for huge pages, which what is allocated later comes to lie in."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(_HEAP)
    if start is None:  # a limit on address space
        return
    aligned = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(aligned, start + _HEAP - aligned, _MADV_HUGEPAGE)
    libc.free(start)
