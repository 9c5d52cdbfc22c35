"""This process among all ranks: its number, its device, and small exchanges between ranks on the host.

In: torchrun's environment. Out: a `DistContext`, with `torch.distributed` initialised where there are several ranks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from higgs_tune.shards.memory import keep_memory
from higgs_tune.train.dist.rendezvous import meet

DIST_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process among all: its rank, their number, and their number on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


@dataclass(frozen=True)
class DistContext:
    """Where this process runs.

    control: a process group for small host messages; None with one rank.
    """

    world: World
    device: torch.device
    control: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.world.rank == 0

    @property
    def queues(self) -> bool:
        """Whether the device runs asynchronously to the host, as a GPU does."""
        return self.device.type == "cuda"

    def all_sum(self, values: list[float]) -> list[float]:
        """Sum each value over all ranks: a blocking all-reduce on the host that does not touch the device."""
        if self.control is None:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Gather a host tensor of every rank: [ranks, ...]. All ranks pass the same shape."""
        if self.control is None:
            return values[None].clone()
        gathered = [torch.empty_like(values) for _ in range(self.world.size)]
        dist.all_gather(gathered, values, group=self.control)
        return torch.stack(gathered)


def join_world() -> DistContext:
    """Initialise `torch.distributed` from torchrun's environment, and choose the device."""
    names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    rank, size, local_rank, local_size = (int(os.environ.get(name, default)) for name, default in names)
    world = World(rank, size, local_rank, local_size)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif local_size > 1:  # torchrun sets one thread a process; the cores are ours
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    if device.type == "cpu":
        keep_memory()
    control: dist.ProcessGroup | None = None
    if size > 1:
        backend, store = "nccl" if device.type == "cuda" else "gloo", meet(rank, size, DIST_TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=DIST_TIMEOUT)
        made = dist.new_group(backend="gloo", timeout=DIST_TIMEOUT)
        control = made if isinstance(made, dist.ProcessGroup) else None
    return DistContext(world, device, control)
