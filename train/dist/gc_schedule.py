"""Python's garbage collector, off during steps: it stops a rank at a moment of its own, and all others wait for it.

What was made before the steps is frozen out of later collections; young garbage is collected at the same steps on
every rank.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

EVERY = 50  # steps between collections of the young generations
FULL_EVERY = 1000  # steps between full ones


@contextlib.contextmanager
def collected_on_schedule() -> Iterator[Callable[[int], None]]:
    """Within the block, garbage is collected only by calling what it gives, with the number of the step."""
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
    if step % EVERY == 0:
        gc.collect(2 if step % FULL_EVERY == 0 else 1)
