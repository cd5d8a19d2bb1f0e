"""Tuning of glibc's memory allocator, whose default settings take up to half of the time of a batch."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_memory"]

# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
KEEP = 1 << 30
GROW_BY = 1 << 26


def keep_memory() -> bool:
    """Tune glibc's allocator to reuse freed memory instead of returning it to the system.

    By default each large block is mapped anew, and the system clears its pages. The tuned allocator takes blocks from
    the heap, keeps up to 1 GiB of free memory and grows by 64 MiB at a time. This lasts for the rest of the process,
    whose resident memory stays at its peak. The environment variables ``MALLOC_MMAP_THRESHOLD_``,
    ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_TOP_PAD_`` have the same effect.

    Returns:
        Whether the allocator was tuned; ``False`` without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):  # musl and others
        return False
    # Older versions of glibc reject a threshold of this size; disabling mmap has the same effect.
    from_heap = libc.mallopt(M_MMAP_THRESHOLD, KEEP) or libc.mallopt(M_MMAP_MAX, 0)
    return bool(from_heap and libc.mallopt(M_TRIM_THRESHOLD, KEEP) and libc.mallopt(M_TOP_PAD, GROW_BY))
