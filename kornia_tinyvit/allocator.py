"""The memory allocator of the process, which takes up to half of the time of a batch when it is left as it comes."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_memory"]

# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
KEEP = 1 << 30
GROW_BY = 1 << 26


def keep_memory() -> bool:
    """Tell glibc's allocator to keep the memory that large tensors free, instead of giving it back to the system.

    Otherwise every large block is asked for anew, and the system has to clear its pages each time. Afterwards blocks
    come from the heap, which keeps up to 1 GiB that is free and grows by 64 MiB at a time. It holds for the whole
    process, once and for all, as do the variables ``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_`` and
    ``MALLOC_TOP_PAD_``, which do the same from outside; the resident memory then stays at its largest.

    Returns:
        Whether it was done; ``False`` without glibc, where nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):  # musl and others
        return False
    # Older versions of glibc refuse so large a threshold; forbidding them maps of their own comes to the same.
    from_heap = libc.mallopt(M_MMAP_THRESHOLD, KEEP) or libc.mallopt(M_MMAP_MAX, 0)
    return bool(from_heap and libc.mallopt(M_TRIM_THRESHOLD, KEEP) and libc.mallopt(M_TOP_PAD, GROW_BY))
