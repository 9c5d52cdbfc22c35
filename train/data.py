"""The loader: from the plan to batches, in order, on stateless workers.

In: shard sets, this rank's place in the world, where to start. Out: an endless stream of `Batch`: pack
`cursor + a * world + r` for rank r at micro-step a. Never: state in a worker (it gets row numbers, nothing else), a
rank that runs out before the others (beyond the last pack of an epoch comes a zero-weight pack), a damaged sample that
goes unnoticed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..shards.errors import ShardError, UserError
from ..shards.format import Sample
from ..shards.plan import Plan, PlanInput, plan_epoch
from ..shards.reader import ShardSet
from .batch import Batch, collate

OnBadSample = Literal["stop", "skip"]


@dataclass(frozen=True)
class World:
    """This process among all: its rank, their number, and their number on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


@dataclass(frozen=True)
class Cursor:
    """Where training stands: the next pack of an epoch. Independent of the number of ranks."""

    epoch: int = 0
    pack: int = 0


@dataclass(frozen=True)
class PackRequest:
    """What a worker is asked for: rows (over all sets), and whether their labels count."""

    rows: tuple[int, ...]
    weight: int


@dataclass(frozen=True)
class LoadFailure:
    """A damaged sample, sent from a worker in place of the batch: what an exception would say."""

    message: str


class Sets:
    """Several shard sets under one row number: the rows of the first, then those of the second, and so on."""

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        self.sets = list(sets)
        self.starts = np.cumsum([0, *[len(shards) for shards in sets]])

    def place(self, row: int) -> tuple[ShardSet, int]:
        """The set of a row, and the row's number in it."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.sets[number], row - int(self.starts[number])


class PackDataset(Dataset[Batch | LoadFailure]):
    """Rows in, batch out: read, verify, expand, flatten.

    Args:
        on_bad_sample: `stop` sends a failure; `skip` leaves the sample out and names it in the batch.
        features: Whisper features that the model takes.
    """

    def __init__(self, sets: Sets, on_bad_sample: OnBadSample = "stop", features: str = "none") -> None:
        self.sets, self.on_bad_sample, self.features = sets, on_bad_sample, features

    def __getitem__(self, request: PackRequest) -> Batch | LoadFailure:  # pyright: ignore[reportIncompatibleMethodOverride]
        samples: list[Sample] = []
        seconds, damaged = 0.0, []
        for row in request.rows:
            shards, number = self.sets.place(row)
            try:
                samples.append(shards.read(number, mels=self.features != "none"))
                seconds += float(shards.index["seconds"][number])
            except ShardError as error:
                if self.on_bad_sample == "stop":
                    return LoadFailure(str(error))
                damaged.append(str(error))
        ids = self.sets.sets[0].special_ids
        return collate(samples, seconds, ids, weight=request.weight, features=self.features, damaged=damaged)


class Schedule:
    """Which packs this rank takes, epoch after epoch, from a cursor on.

    Args:
        sets: shard sets; their training splits are planned.
        mix_weights: a weight for each set (see `plan_epoch`), or None to pack all samples together.
        tokens_per_pack, seed: see `make_plan`.
        accumulation: packs of a rank for each optimizer step.
        features: Whisper features that the model takes; they count as positions.

    Raises:
        UserError: a sample is longer than a pack (named), or there is none to train on.
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        *,
        tokens_per_pack: int,
        seed: int,
        accumulation: int,
        world: World,
        mix_weights: tuple[float, ...] | None = None,
        features: str = "none",
    ) -> None:
        self.sets, self.seed, self.tokens_per_pack = Sets(sets), seed, tokens_per_pack
        self.accumulation, self.world, self.weighted = accumulation, world, mix_weights is not None
        weights = mix_weights or (1.0,) * len(sets)
        self.inputs = [
            _plan_input(shards, int(start), weight, features, tokens_per_pack)
            for shards, start, weight in zip(sets, self.sets.starts[:-1], weights, strict=True)
        ]
        if not sum(len(given.rows) for given in self.inputs):
            raise UserError("no training sample", where=", ".join(shards.location for shards in sets))
        self._plans: dict[int, Future[Plan]] = {}
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="plan")

    def plan(self, epoch: int) -> Plan:
        """The packs of an epoch, the same on every rank; the one after it is made meanwhile."""
        plan = self._planned(epoch).result()
        self._planned(epoch + 1)
        for old in [number for number in self._plans if number < epoch]:
            del self._plans[old]
        return plan

    def _planned(self, epoch: int) -> Future[Plan]:
        if epoch not in self._plans:
            options = {"tokens_per_pack": self.tokens_per_pack, "seed": self.seed, "weighted": self.weighted}
            self._plans[epoch] = self._planner.submit(partial(plan_epoch, self.inputs, epoch=epoch, **options))
        return self._plans[epoch]

    @property
    def packs_per_step(self) -> int:
        """Packs of all ranks in one optimizer step."""
        return self.world.size * self.accumulation

    def steps(self, plan: Plan) -> int:
        """Optimizer steps of a whole epoch: enough for every pack."""
        return -(-len(plan) // self.packs_per_step)

    def after(self, cursor: Cursor) -> Cursor:
        """Where training stands after one more optimizer step."""
        pack = cursor.pack + self.packs_per_step
        return Cursor(cursor.epoch, pack) if pack < len(self.plan(cursor.epoch)) else Cursor(cursor.epoch + 1, 0)

    def requests(self, cursor: Cursor) -> Iterator[PackRequest]:
        """This rank's packs from a cursor on, endlessly."""
        while True:
            plan = self.plan(cursor.epoch)
            for micro_step in range(self.accumulation):
                rows = plan.pack(cursor.pack + micro_step * self.world.size + self.world.rank)
                if len(rows):
                    yield PackRequest(tuple(rows.tolist()), 1)
                else:
                    yield PackRequest((int(plan.rows[0]),), 0)
            cursor = self.after(cursor)


def _plan_input(shards: ShardSet, start: int, weight: float, features: str, tokens_per_pack: int) -> PlanInput:
    rows = shards.rows_of(validation=False)
    lengths = np.asarray(shards.index["tokens"][rows], np.int64)
    if features != "none":
        lengths = lengths + shards.index["mel_tokens"][rows]
    long = rows[lengths > tokens_per_pack]
    if len(long):
        keys = ", ".join(key.decode() for key in shards.index["key"][long[:10]])
        raise UserError(
            f"{len(long)} samples are longer than a pack: {keys}{', …' if len(long) > 10 else ''}",
            where=shards.location,
            expected=f"at most --tokens_per_pack {tokens_per_pack}",
            got=int(lengths.max()),
        )
    return PlanInput(rows + start, lengths, shards.manifest_hash, weight)


class _Endless:
    """An iterable of requests for the DataLoader, which wants one with no end."""

    def __init__(self, schedule: Schedule, cursor: Cursor) -> None:
        self.schedule, self.cursor = schedule, cursor

    def __iter__(self) -> Iterator[PackRequest]:
        return self.schedule.requests(self.cursor)


@dataclass(frozen=True)
class LoaderOptions:
    """workers: processes of this rank. start_method: how they start. pin_memory: for a GPU. on_bad_sample,
    max_bad_samples: what to do about damaged samples. features: Whisper features that the model takes."""

    workers: int = 0
    start_method: Literal["fork", "spawn"] = "fork"
    pin_memory: bool = False
    on_bad_sample: OnBadSample = "stop"
    max_bad_samples: int = 100
    features: str = "none"


@dataclass
class Waits:
    """Seconds that training waited for each batch, the first one apart."""

    first_s: float = 0.0
    rest_s: list[float] = field(default_factory=list)

    def add(self, seconds: float, *, first: bool) -> None:
        if first:
            self.first_s = seconds
        else:
            self.rest_s.append(seconds)

    def summary(self) -> dict[str, float]:
        """`first_batch_s`, and median, 99th percentile and largest of the others."""
        rest = self.rest_s or [0.0]
        p50, p99 = np.percentile(rest, [50, 99]).tolist()
        return {"first_batch_s": self.first_s, "p50_s": p50, "p99_s": p99, "max_s": max(rest)}


class Loader:
    """The endless loader of one rank; measures how long each batch is waited for.

    Raises (while iterating):
        ShardError: a sample is damaged, or more than `max_bad_samples` are.
        UserError: a worker process died.
    """

    def __init__(self, schedule: Schedule, options: LoaderOptions, cursor: Cursor | None = None) -> None:
        self.options, self.waits, self.damaged = options, Waits(), list[str]()
        self._loader: DataLoader[Any] = DataLoader(
            PackDataset(schedule.sets, options.on_bad_sample, options.features),
            batch_size=None,
            sampler=_Endless(schedule, cursor or Cursor()),  # pyright: ignore[reportArgumentType]
            num_workers=options.workers,
            pin_memory=options.pin_memory,
            persistent_workers=options.workers > 0,
            prefetch_factor=4 if options.workers else None,
            multiprocessing_context=options.start_method if options.workers else None,
            worker_init_fn=_one_thread,
        )
        self._batches: Iterator[Batch | LoadFailure] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began, first = time.perf_counter(), self._batches is None
        batch = self._next()
        self.waits.add(time.perf_counter() - began, first=first)
        if isinstance(batch, LoadFailure):
            raise ShardError(f"{batch.message} [--on_bad_sample skip goes on without such samples]")
        self.damaged += batch.damaged
        if len(self.damaged) > self.options.max_bad_samples:
            limit = self.options.max_bad_samples
            raise ShardError(f"more than --max_bad_samples {limit} damaged samples; the last: {self.damaged[-1]}")
        return batch

    def _next(self) -> Batch | LoadFailure:
        if self._batches is None:
            self._batches = iter(self._loader)
        try:
            return next(self._batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            hint = "Was it killed for memory? Fewer --dataloader_num_workers or --tokens_per_pack need less."
            raise UserError(f"a loader process died: {error}", hint=hint) from error

    def close(self) -> None:
        """Stop the worker processes."""
        self._batches = None
        self._loader._iterator = None


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
