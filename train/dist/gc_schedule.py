"""Garbage collection at fixed steps.

Python's collector would stop one rank at a time of its own, and the others would wait for it in the next all-reduce.
So it is off during the steps. Objects made before the steps are frozen: later collections do not visit them.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

YOUNG_EVERY = 50  # steps between collections of the young generations
FULL_EVERY = 1000  # steps between full collections


@contextlib.contextmanager
def scheduled_gc() -> Iterator[Callable[[int], None]]:
    """Switch automatic collection off within the block; gives a function to call with the number of each step."""
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield _collect
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def _collect(step: int) -> None:
    if step % YOUNG_EVERY == 0:
        gc.collect(2 if step % FULL_EVERY == 0 else 1)
