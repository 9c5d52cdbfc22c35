"""Host memory of a process that computes on a CPU: freed memory is kept, caches of compiled shapes are limited.

Nothing here imports torch; the settings reach the C library by `mallopt`, oneDNN and PyTorch by the environment.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
LARGEST_KEPT = 1 << 30  # bytes; a larger block goes back to the system at once
NEVER = -1
SHAPE_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's, and PyTorch's around it
SHAPES_KEPT = 128  # entries of each cache; about the shapes of one training step


def keep_memory() -> None:
    """Make this process keep the memory that it frees; without glibc, do nothing.

    By default, a large CPU tensor is new memory from the system each time, and goes back when it is freed. The first
    touch of its pages costs about a tenth of the codec's and of the training step's time.
    """
    set_thresholds(mmap=LARGEST_KEPT, trim=NEVER)


def limit_shape_caches() -> None:
    """Limit the caches of compiled matrix products and convolutions; call it before the first of them.

    oneDNN compiles code for each shape. It caches 1,024 of them, and PyTorch 1,024 more. Packs and clips have ever new
    shapes, so the caches fill with entries that are never used again (about 0.25 MB each). These also lie between freed
    blocks, which then cannot be joined for larger tensors. A limit that the user's environment sets is kept.

    Source: oneDNN's developer guide, "Primitive Cache"; ideep, lru_cache.hpp.
    """
    for name in SHAPE_CACHES:
        os.environ.setdefault(name, str(SHAPES_KEPT))


def set_thresholds(*, mmap: int, trim: int) -> None:
    """Set glibc's thresholds, in bytes.

    Args:
        mmap: blocks of at least this size come from the system one by one.
        trim: free memory at the heap's end goes back to the system beyond this size.
    """
    with suppress(OSError, AttributeError):
        c = ctypes.CDLL(None)
        c.mallopt(M_MMAP_THRESHOLD, mmap)
        c.mallopt(M_TRIM_THRESHOLD, trim)
