"""The loader: from the plan to batches, in order, on stateless workers.

In: a shard set, a plan for each epoch, this rank's place in the world. Out: an endless stream of `Batch`, pack
`cursor + a * world + r` for rank r at micro-step a. Never: state in a worker (it gets row numbers, nothing else), a
rank that runs out before the others: beyond the last pack of an epoch comes a zero-weight pack.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..shards.errors import UserError
from ..shards.plan import Plan, make_plan
from ..shards.reader import ShardSet
from .batch import Batch, collate


@dataclass(frozen=True)
class World:
    """This process among all: its rank, their number, and their number on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


@dataclass(frozen=True)
class PackRequest:
    """What a worker is asked for: rows of the index, and whether their labels count."""

    rows: tuple[int, ...]
    weight: int


class PackDataset(Dataset[Batch]):
    """Rows in, batch out: read, verify, expand, flatten."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards

    def __getitem__(self, request: PackRequest) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        samples = [self.shards.read(row) for row in request.rows]
        seconds = float(self.shards.index["seconds"][list(request.rows)].sum())
        return collate(samples, seconds, self.shards.special_ids, weight=request.weight)


class Schedule:
    """Which packs this rank takes, epoch after epoch.

    Args:
        shards: the set; its training split is planned.
        tokens_per_pack, seed: see `make_plan`.
        accumulation: packs of a rank for each optimizer step.

    Raises:
        UserError: a sample is longer than a pack (named), or there is none to train on.
    """

    def __init__(self, shards: ShardSet, *, tokens_per_pack: int, seed: int, accumulation: int, world: World) -> None:
        self.shards, self.seed, self.tokens_per_pack = shards, seed, tokens_per_pack
        self.accumulation, self.world = accumulation, world
        self.rows = shards.rows_of(validation=False)
        self.lengths = np.asarray(shards.index["tokens"][self.rows], np.int64)
        self._refuse_long()
        self.first_plan = self.plan(0)

    def _refuse_long(self) -> None:
        if not len(self.rows):
            raise UserError("the shard set has no training sample", where=self.shards.location)
        long = self.rows[self.lengths > self.tokens_per_pack]
        if len(long):
            keys = ", ".join(key.decode() for key in self.shards.index["key"][long[:10]])
            raise UserError(
                f"{len(long)} samples are longer than a pack: {keys}{', …' if len(long) > 10 else ''}",
                where=self.shards.location,
                expected=f"at most --tokens_per_pack {self.tokens_per_pack}",
                got=int(self.lengths.max()),
            )

    def plan(self, epoch: int) -> Plan:
        """The packs of an epoch, the same on every rank."""
        return make_plan(
            self.rows,
            self.lengths,
            tokens_per_pack=self.tokens_per_pack,
            seed=self.seed,
            epoch=epoch,
            set_hash=self.shards.manifest_hash,
        )

    def steps(self, plan: Plan) -> int:
        """Optimizer steps of an epoch: enough for every pack."""
        return -(-len(plan) // (self.world.size * self.accumulation))

    def requests(self) -> Iterator[PackRequest]:
        """This rank's packs, endlessly."""
        epoch = 0
        while True:
            plan = self.first_plan if epoch == 0 else self.plan(epoch)
            for micro_step in range(self.steps(plan) * self.accumulation):
                rows = plan.pack(micro_step * self.world.size + self.world.rank)
                if len(rows):
                    yield PackRequest(tuple(rows.tolist()), 1)
                else:
                    yield PackRequest((int(plan.rows[0]),), 0)
            epoch += 1


class _Endless:
    """An iterable of requests for the DataLoader, which wants one with no end."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __iter__(self) -> Iterator[PackRequest]:
        return self.schedule.requests()


def make_loader(schedule: Schedule, *, workers: int, pin_memory: bool) -> DataLoader[Batch]:
    """The endless loader of this rank."""
    return DataLoader(
        PackDataset(schedule.shards),
        batch_size=None,
        sampler=_Endless(schedule),  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_one_thread,
    )


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
