"""The C allocator on a CPU: freed memory is kept, and allocated in huge pages.

glibc returns a freed block of more than some megabytes to the system, and every page of the next such block costs a
fault when it is first touched. A training step on a CPU frees and allocates the same gigabyte over and over: about 15%
of its time. A page of 4 KiB also needs its own entry in the page table, and the processor can't cache the entries of a
gigabyte: with pages of 2 MiB a step takes about 10% less time.
"""

from __future__ import annotations

import ctypes
import os

# The numbers of mallopt(3) and madvise(2) in glibc.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, MADV_HUGEPAGE = -1, -3, -4, 14
NEVER = -1
HUGE_PAGE_BYTES = 2 << 20

_reserved = False


def keep_freed_memory() -> bool:
    """From now on this process keeps freed memory; False if the C library has no such setting.

    For a process that trains on the CPU: its memory stays at its peak. A quarter of the machine's memory is requested
    in huge pages; that is address space, and uses memory only when it is touched.
    """
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None or not (mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER)):
        return False
    global _reserved
    if not _reserved:
        _reserve_huge_pages(libc, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)
        _reserved = True
    return True


def return_freed_memory() -> bool:
    """Until `keep_freed_memory`, freed blocks of a megabyte and more go back to the system at once; False if the C
    library has no such setting.

    For a process that makes its model from parts: glibc starts to keep blocks of the size of freed ones, up to 32 MiB,
    and later allocations are larger than the gaps between them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, 1 << 20))


def _reserve_huge_pages(libc: ctypes.CDLL, size: int) -> None:
    """Grow the heap by this many bytes and request huge pages there: freed at once, they serve the next allocations."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block:
        start = -(-block // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        end = (block + size) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        libc.madvise(start, max(0, end - start), MADV_HUGEPAGE)
        libc.free(block)
