"""How this process asks the system for memory.

In: nothing. Out: nothing; freed memory stays with the process. Never: on another C library than glibc, where this does
nothing.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
LARGEST_KEPT = 1 << 30  # bytes; a block above is given back at once, still
NEVER = -1


def keep_memory() -> None:
    """Have this process keep the memory that it frees.

    By default each large tensor on the CPU comes fresh from the system and goes back when it is freed. The first touch
    of its pages costs about a tenth of the codec's and of the training step's time.
    """
    set_thresholds(mmap=LARGEST_KEPT, trim=NEVER)


def set_thresholds(*, mmap: int, trim: int) -> None:
    """Size from which a block is the system's own, and free bytes at the heap's end that are given back."""
    with suppress(OSError, AttributeError):
        c = ctypes.CDLL(None)
        c.mallopt(M_MMAP_THRESHOLD, mmap)
        c.mallopt(M_TRIM_THRESHOLD, trim)
