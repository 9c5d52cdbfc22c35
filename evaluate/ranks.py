"""The processes of an evaluation: torchrun starts one a GPU, they share the lines, rank 0 writes the results.

In: torchrun's environment. Out: `Ranks`. What ranks tell each other stands in files of the evaluation's folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

Item = TypeVar("Item")
PATIENCE = timedelta(days=7)  # for the slowest rank; torchrun ends all ranks when one dies


@dataclass(frozen=True)
class Ranks:
    """This process's number, the number of all processes, and the number on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.rank == 0

    @property
    def part(self) -> int | None:
        """Names this rank's own files; None where it is alone."""
        return self.rank if self.size > 1 else None

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This rank's items."""
        return list(items[self.rank :: self.size])

    def device(self, given: str) -> str:
        """The device of `--device` on this rank: auto gives each rank a GPU of its own."""
        if self.size == 1 or given != "auto":
            return given
        import torch

        return f"cuda:{self.local_rank}" if torch.cuda.is_available() else "cpu"

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()


def join_ranks() -> Ranks:
    """Meet the other ranks, where torchrun started this process."""
    rank, size, local_rank = (int(os.environ.get(name, default)) for name, default in _NAMES)
    if size > 1:
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=PATIENCE)
    return Ranks(rank, size, local_rank)


_NAMES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
