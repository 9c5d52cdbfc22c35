"""The distributed context: rank, device, and small collectives on the host.

In: torchrun's environment. Out: a `DistContext`; `torch.distributed` is initialised if there are several ranks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from higgs_tune.shards.memory import keep_memory, limit_shape_caches
from higgs_tune.train.dist.rendezvous import restart_safe_store

DIST_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process's rank and the number of ranks, in all and on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


@dataclass(frozen=True)
class DistContext:
    """Rank and device of this process.

    control: a gloo group for small host messages; None with one rank.
    """

    world: World
    device: torch.device
    control: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.world.rank == 0

    @property
    def is_asynchronous(self) -> bool:
        """Whether the device runs asynchronously to the host, as a GPU does."""
        return self.device.type == "cuda"

    def all_sum(self, values: list[float]) -> list[float]:
        """Sum each value over all ranks: a blocking all-reduce on the host, without the device."""
        if self.control is None:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def text_of_main(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        data = text.encode() if self.is_main else b""
        size = int(self.all_sum([float(len(data))])[0])
        return bytes(map(int, self.all_sum(list(map(float, data)) or [0.0] * size))).decode()

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """A host tensor of every rank, all of one shape: [ranks, ...]."""
        if self.control is None:
            return values[None].clone()
        gathered = [torch.empty_like(values) for _ in range(self.world.size)]
        dist.all_gather(gathered, values, group=self.control)
        return torch.stack(gathered)


def init_distributed() -> DistContext:
    """Initialise `torch.distributed` from torchrun's environment, and choose the device."""
    names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    rank, size, local_rank, local_size = (int(os.environ.get(name, default)) for name, default in names)
    world = World(rank, size, local_rank, local_size)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif local_size > 1:  # torchrun sets one thread a process; use all cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    if device.type == "cpu":
        keep_memory()
        limit_shape_caches()
    control: dist.ProcessGroup | None = None
    if size > 1:
        backend, store = "nccl" if device.type == "cuda" else "gloo", restart_safe_store(rank, size, DIST_TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=DIST_TIMEOUT)
        group = dist.new_group(backend="gloo", timeout=DIST_TIMEOUT)
        control = group if isinstance(group, dist.ProcessGroup) else None
    return DistContext(world, device, control)
