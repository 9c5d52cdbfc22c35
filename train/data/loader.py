"""The loader: from pack requests to batches, in order.

In: a schedule and a cursor. Out: an endless stream of `Batch`. Workers keep no state: a request is row numbers alone.

Guarantees (tests/test_loader.py):
    The batches do not depend on the number of workers or on how they start.
    A damaged sample ends the run, or is left out and named in its batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
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
WAITS_KEPT = 10_000  # the percentiles are of the last waits
OnBadSample = Literal["stop", "skip"]
ReferenceCollate = Callable[[Sequence[Stored], SpecialIds], dict[str, Any]]


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made.

    Attributes:
        workers: loader processes of this rank. start_method: how they start.
        pin_memory: for a GPU.
        on_bad_sample: `stop` ends the run at a damaged sample; `skip` leaves it out and names it in the batch, up to
            max_bad_samples.
        features: Whisper features that the model takes.
        train_inputs: label reference audio too.
        contrastive: add the inputs of the contrastive loss.
        reference_collate: boson's own collator, for `--forward reference`; picklable.
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
    """A damaged sample's error message, sent from a worker in place of the batch."""

    message: str


class PackDataset(Dataset[Batch | LoadFailure]):
    """From a request's rows to a batch: read, verify, collate."""

    def __init__(self, sets: Sets, options: LoaderOptions) -> None:
        self.sets, self.options = sets, options

    def __getitem__(self, request: PackRequest) -> Batch | LoadFailure:  # pyright: ignore[reportIncompatibleMethodOverride]
        samples: list[Stored] = []
        speakers: list[int] = []
        seconds, damaged = 0.0, []
        for shards, rows in self.sets.places(request.rows):
            seconds += float(shards.index["seconds"][rows].sum())
            for row, sample in zip(rows, self._read(shards, rows), strict=True):
                if not isinstance(sample, ShardError):
                    samples.append(sample)
                    speakers.append(self.sets.speaker(shards, row) if self.options.contrastive else 0)
                elif self.options.on_bad_sample == "stop":
                    return LoadFailure(str(sample))
                else:
                    damaged.append(str(sample))
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
        )
        if self.options.reference_collate is not None:
            batch.reference = self.options.reference_collate(samples, ids)
        return batch

    def _read(self, shards: ShardSet, rows: list[int]) -> Iterator[Stored | ShardError]:
        """The samples of a set's rows; in place of a damaged one, its error."""
        if self.options.features == "none":
            yield from shards.read_arrays(rows)
            return
        for row in rows:
            try:
                yield shards.read(row, mels=True)
            except ShardError as error:
                yield error


class _Requests:
    """This rank's requests from a cursor on, as the DataLoader's sampler."""

    def __init__(self, schedule: Schedule, cursor: Cursor) -> None:
        self.schedule, self.cursor = schedule, cursor

    def __iter__(self) -> Iterator[PackRequest]:
        return self.schedule.requests(self.cursor)


@dataclass
class Waits:
    """Seconds that training waited for batches; the first batch, which starts the workers, is kept apart."""

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
        """`first_batch_s`; of later waits `max_s`, and `p50_s` and `p99_s` of the last `WAITS_KEPT`."""
        p50, p99 = np.percentile(self.last_s or [0.0], [50, 99]).tolist()
        return {"first_batch_s": self.first_s, "p50_s": p50, "p99_s": p99, "max_s": self.max_s}


class Loader:
    """The endless loader of one rank; measures the wait for each batch.

    Raises (while iterating):
        ShardError: a sample is damaged, or more than `max_bad_samples` are.
        UserError: a worker process died.
    """

    def __init__(self, schedule: Schedule, options: LoaderOptions, cursor: Cursor | None = None) -> None:
        self.options, self.waits, self.damaged = options, Waits(), list[str]()
        self._requests, self._dataset = _Requests(schedule, cursor or Cursor()), PackDataset(schedule.sets, options)
        self._loader: DataLoader[Any] = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=self._requests,  # pyright: ignore[reportArgumentType]
            num_workers=options.workers,
            pin_memory=options.pin_memory,
            persistent_workers=options.workers > 0,
            prefetch_factor=PREFETCH if options.workers else None,
            multiprocessing_context=options.start_method if options.workers else None,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else it draws from the global one, which dropout uses: a resume would differ
        )
        self._batches: Iterator[Batch | LoadFailure] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def start_at(self, cursor: Cursor) -> None:
        """Start at another cursor; call it before the first batch is taken."""
        assert self._batches is None
        self._requests.cursor = cursor

    @property
    def special_ids(self) -> SpecialIds:
        """Special ids of the sets' checkpoint."""
        return self._dataset.sets.sets[0].special_ids

    def peek(self, count: int, features: str | None = None) -> Iterator[Batch]:
        """The first batches, made in this process; iterating still yields them.

        Args:
            features: Whisper features of the batches, in place of the run's.
        """
        dataset = self._dataset
        if features is not None:
            dataset = PackDataset(dataset.sets, replace(self.options, features=features, reference_collate=None))
        for request in islice(self._requests, count):
            batch = dataset[request]
            if isinstance(batch, LoadFailure):
                raise ShardError(batch.message)
            yield batch

    def __next__(self) -> Batch:
        began, first = time.perf_counter(), self._batches is None
        batch = self._next()
        self.waits.add(time.perf_counter() - began, first=first)
        if isinstance(batch, LoadFailure):
            raise ShardError(f"{batch.message} [--on_bad_sample skip leaves such samples out]")
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
    """Turn torch's error about a dead loader process into a UserError that names the process.

    Torch raises it from a signal handler, so it can come from any line of the block.

    Raises:
        UserError: a loader process died within the block.
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
