"""The loader: from requests to batches, in order, on stateless workers.

In: a schedule, where to start. Out: an endless stream of `Batch`. Never: state in a worker (it gets row numbers,
nothing else), a damaged sample that goes unnoticed, a wait that is not counted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from higgs_tune.shards.errors import ShardError, UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import SpecialIds, Stored
from higgs_tune.train.data.batch import Batch, collate
from higgs_tune.train.data.sampler import Cursor, PackRequest, Schedule, Sets
from higgs_tune.train.dist.signals import outlive_stop_signals
from torch.utils.data import DataLoader, Dataset

PREFETCH = 4  # batches that each worker makes ahead
WAITS_KEPT = 10_000  # waits that the percentiles are of
INTS_A_POSITION = 24  # more than a batch holds for a position: 8 codes, 8 labels, indices
OnBadSample = Literal["stop", "skip"]
ReferenceCollate = Callable[[Sequence[Stored], SpecialIds], dict[str, Any]]


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made.

    Attributes:
        workers: loader processes of this rank. start_method: how they start. pin_memory: for a GPU.
        on_bad_sample: `stop` ends the run at a damaged sample; `skip` leaves it out and names it in the batch, up to
            max_bad_samples.
        features: Whisper features that the model takes.
        train_inputs: label reference audio too. contrastive: add what the contrastive loss needs.
        reference_collate: boson's own collator, where its forward is to be used (`--forward reference`); picklable.
    """

    workers: int = 0
    start_method: Literal["fork", "spawn"] = "fork"
    pin_memory: bool = False
    on_bad_sample: OnBadSample = "stop"
    max_bad_samples: int = 100
    features: str = "none"
    train_inputs: bool = False
    contrastive: bool = False
    reference_collate: ReferenceCollate | None = None


@dataclass(frozen=True)
class LoadFailure:
    """A damaged sample, sent from a worker in place of the batch: what an exception would say."""

    message: str


class SlotRing:
    """Shared memory that loader processes write batches into, made once.

    Handing a tensor from a process to another costs a new shared-memory file, a socket connection and its page faults
    each time, which is more than making the batch. A ring of slots costs one copy. Batch number i goes through slot i
    modulo the number of slots; the loader requests at most `slots - 2` batches ahead, so no slot is overwritten before
    it is read.

    Args:
        slots, ints: `slots` rows of `ints` int32. Fork inherits the memory; a spawned process gets it once.
    """

    def __init__(self, slots: int, ints: int) -> None:
        self.memory = torch.zeros((slots, ints), dtype=torch.int32).share_memory_()

    def __len__(self) -> int:
        return len(self.memory)

    def room(self, number: int, ints: int) -> torch.Tensor | None:
        """The first `ints` of a batch's slot, to write to; None where they do not fit."""
        slot = self.memory[number % len(self.memory)]
        return slot[:ints] if ints <= len(slot) else None

    def take(self, number: int, ints: int, *, pin_memory: bool) -> torch.Tensor:
        """A copy of a batch's slot, in pinned memory where a GPU is to read it."""
        out = torch.empty(ints, dtype=torch.int32, pin_memory=pin_memory)
        out.numpy()[:] = self.memory[number % len(self.memory), :ints].numpy()  # numpy's copy takes one thread
        return out


class PackDataset(Dataset[Batch | LoadFailure]):
    """Rows in, batch out: read, verify, expand, flatten.

    Args:
        ring: where batches are put for another process to take; None: they stay in this one.
    """

    def __init__(self, sets: Sets, options: LoaderOptions, ring: SlotRing | None = None) -> None:
        self.sets, self.options, self.ring = sets, options, ring

    def __getitem__(self, request: PackRequest) -> Batch | LoadFailure:  # pyright: ignore[reportIncompatibleMethodOverride]
        samples: list[Stored] = []
        speakers: list[int] = []
        seconds, damaged = 0.0, []
        for shards, rows in self.sets.places(request.rows):
            seconds += float(shards.index["seconds"][rows].sum())
            for row, found in zip(rows, self._read(shards, rows), strict=True):
                if not isinstance(found, ShardError):
                    samples.append(found)
                    speakers.append(self.sets.speaker(shards, row) if self.options.contrastive else 0)
                elif self.options.on_bad_sample == "stop":
                    return LoadFailure(str(found))
                else:
                    damaged.append(str(found))
        ids = self.sets.sets[0].special_ids
        batch = collate(
            samples,
            seconds,
            ids,
            weight=request.weight,
            features=self.options.features,
            train_inputs=self.options.train_inputs,
            speakers=speakers if self.options.contrastive else None,
            damaged=damaged,
            room=partial(self.ring.room, request.number) if self.ring else None,
        )
        if self.options.reference_collate is not None:
            batch.reference = self.options.reference_collate(samples, ids)
        if self.ring and batch.flat.data_ptr() == self.ring.memory[request.number % len(self.ring)].data_ptr():
            batch.in_slot, batch.flat = len(batch.flat), torch.empty(0, dtype=torch.int32)
        return batch

    def _read(self, shards: ShardSet, rows: list[int]) -> Iterator[Stored | ShardError]:
        """The samples of a set's rows, or what is wrong with them."""
        if self.options.features == "none":
            yield from shards.read_arrays(rows)
            return
        for row in rows:
            try:
                yield shards.read(row, mels=True)
            except ShardError as error:
                yield error


class _Endless:
    """An iterable of requests for the DataLoader, which wants one with no end."""

    def __init__(self, schedule: Schedule, cursor: Cursor) -> None:
        self.schedule, self.cursor = schedule, cursor

    def __iter__(self) -> Iterator[PackRequest]:
        for number, request in enumerate(self.schedule.requests(self.cursor)):
            yield replace(request, number=number)


@dataclass
class Waits:
    """Seconds that training waited for each batch, the first one apart."""

    first_s: float = 0.0
    max_s: float = 0.0
    last_s: deque[float] = field(default_factory=lambda: deque(maxlen=WAITS_KEPT))

    def add(self, seconds: float, *, first: bool) -> None:
        if first:
            self.first_s = seconds
        else:
            self.last_s.append(seconds)
            self.max_s = max(self.max_s, seconds)

    def summary(self) -> dict[str, float]:
        """`first_batch_s`, the largest of the others, and median and 99th percentile of the last `WAITS_KEPT`."""
        p50, p99 = np.percentile(self.last_s or [0.0], [50, 99]).tolist()
        return {"first_batch_s": self.first_s, "p50_s": p50, "p99_s": p99, "max_s": self.max_s}


class Loader:
    """The endless loader of one rank; measures how long each batch is waited for.

    Raises (while iterating):
        ShardError: a sample is damaged, or more than `max_bad_samples` are.
        UserError: a worker process died.
    """

    def __init__(self, schedule: Schedule, options: LoaderOptions, cursor: Cursor | None = None) -> None:
        self.options, self.waits, self.damaged = options, Waits(), list[str]()
        self._ring, self._number = None, 0
        if options.workers:
            ints = INTS_A_POSITION * schedule.tokens_per_pack + 64
            self._ring = SlotRing(options.workers * PREFETCH + 2, ints)
        self._requests, self._dataset = _Endless(schedule, cursor or Cursor()), PackDataset(schedule.sets, options)
        self._loader: DataLoader[Any] = DataLoader(
            PackDataset(schedule.sets, options, self._ring),
            batch_size=None,
            sampler=self._requests,  # pyright: ignore[reportArgumentType]
            num_workers=options.workers,
            pin_memory=options.pin_memory and (self._ring is None or options.features != "none"),
            persistent_workers=options.workers > 0,
            prefetch_factor=PREFETCH if options.workers else None,
            multiprocessing_context=options.start_method if options.workers else None,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # the process's own would move on, and a resumed run's dropout with it
        )
        self._batches: Iterator[Batch | LoadFailure] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def start_at(self, cursor: Cursor) -> None:
        """Begin elsewhere; before the first batch is asked for."""
        assert self._batches is None
        self._requests.cursor = cursor

    @property
    def special_ids(self) -> SpecialIds:
        """Ids of the sets' tokenizer."""
        return self._dataset.sets.sets[0].special_ids

    def peek(self) -> Batch:
        """The first batch, made in this process; the loader still gives it."""
        batch = self._dataset[next(iter(self._requests))]
        if isinstance(batch, LoadFailure):
            raise ShardError(batch.message)
        return batch

    def __next__(self) -> Batch:
        began, first = time.perf_counter(), self._batches is None
        batch = self._next()
        self.waits.add(time.perf_counter() - began, first=first)
        if isinstance(batch, LoadFailure):
            raise ShardError(f"{batch.message} [--on_bad_sample skip goes on without such samples]")
        if self._ring is not None and batch.in_slot:
            batch.flat = self._ring.take(self._number, batch.in_slot, pin_memory=self.options.pin_memory)
        self._number += 1
        self.damaged += batch.damaged
        if len(self.damaged) > self.options.max_bad_samples:
            limit = self.options.max_bad_samples
            raise ShardError(f"more than --max_bad_samples {limit} damaged samples; the last: {self.damaged[-1]}")
        return batch

    def _next(self) -> Batch | LoadFailure:
        if self._batches is None:
            self._batches = iter(self._loader)
        with naming_dead_workers():
            return next(self._batches)

    def close(self) -> None:
        """Stop the worker processes."""
        self._batches = None
        self._loader._iterator = None


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Say which loader process has died; torch raises that from a signal handler, wherever the program is.

    Raises:
        UserError: a loader process has died within the block.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        hint = "Was it killed for memory? Fewer --dataloader_num_workers or --tokens_per_pack need less."
        raise UserError(f"a loader process died: {error}", hint=hint) from error


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    outlive_stop_signals()
