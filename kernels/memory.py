"""Keeping the C allocator's memory, so that a training step doesn't fetch it anew from the system.

glibc gives a freed block of more than some megabytes back to the system, and every page of the next such block costs a
fault when it is first touched. A training step on a CPU frees and allocates the same gigabyte over and over: about 15%
of its time.
"""

from __future__ import annotations

import ctypes

# The numbers of mallopt(3) in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """From here on this process keeps memory that it frees; False where the C library has no such setting.

    For a process that trains on the CPU: its memory stays at the peak of what it has used.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
