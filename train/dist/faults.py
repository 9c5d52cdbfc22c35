"""What goes wrong in a long run: signals, steps that are not finite, ranks that die.

In: signals, losses, exceptions. Out: flags that all ranks agree on, messages that name the cause. Never: a rank that
acts alone while the others wait for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from higgs_tune.shards.errors import UserError, few
from higgs_tune.train.dist.device_timing import Readback

EXIT_REQUEUE = 75  # EX_TEMPFAIL: start me again
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
WORKER_GRACE_S = 60  # a loader process outlives a stop signal by this, so that its rank can save
SHOWN_KEYS = 8


class Stopped(SystemExit):
    """A signal has stopped the run, after a checkpoint: exit code 75."""

    def __init__(self) -> None:
        super().__init__(EXIT_REQUEUE)


class StopFlag:
    """Set by SIGTERM and SIGUSR1 within the block."""

    def __init__(self) -> None:
        self.name = ""

    def __bool__(self) -> bool:
        return bool(self.name)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        def stop(number: int, _frame: FrameType | None) -> None:
            self.name = signal.Signals(number).name

        try:
            before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
        except ValueError:  # not in the main thread: someone else listens
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def outlive_stop_signals() -> None:
    """In a loader process: a stop signal that reaches the whole process group is the trainer's business."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_S))


@dataclass
class BadSteps:
    """Steps whose loss or gradient is not finite; they change no weight. Read from the device without waiting for it.

    count: of this run so far, the same on every rank once all steps are read.
    """

    limit: int
    rank: int
    count: int = 0
    waiting: deque[tuple[int, list[list[str]], Readback]] = field(default_factory=deque)

    def watch(self, step: int, keys: list[list[str]], finite: torch.Tensor) -> None:
        """Note a step, to be read later.

        Args:
            keys: the samples of each micro-batch.
            finite: bool [1 + micro-batches], on the device: the gradient, then each micro-batch's loss.
        """
        self.waiting.append((step, keys, Readback(finite)))

    def read(self, *, until: int | None = None) -> None:
        """Count the steps that the device has finished; with `until`, wait for those up to it and count no others."""
        while self.waiting:
            step, keys, found = self.waiting[0]
            if not found.there if until is None else step > until:
                return
            finite = found.wait()
            self.waiting.popleft()
            if not finite[0]:
                self.count += 1
                self._tell(step, keys, finite[1:].tolist())

    def _tell(self, step: int, keys: list[list[str]], finite: list[bool]) -> None:
        named = [few(pack, SHOWN_KEYS) for pack in keys]
        bad = [pack for pack, good in zip(named, finite, strict=True) if not good]
        if bad or self.rank == 0:
            packs = "; ".join(bad) if bad else f"no loss of rank {self.rank}'s packs: {'; '.join(named)}"
            print(f"warning: step {step} is skipped ({self.count} so far): loss or gradient is not finite. "
                  f"Rank {self.rank}, pack of {packs}", file=sys.stderr, flush=True)  # fmt: skip

    @property
    def too_many(self) -> bool:
        return self.count > self.limit

    def refuse(self) -> NoReturn:
        hint = "A lower --learning_rate helps where training has diverged; see the packs named above."
        raise UserError("too many steps were not finite", expected=f"at most --max_bad_steps {self.limit}",
                        got=self.count, hint=hint)  # fmt: skip


@contextlib.contextmanager
def naming_memory(describe: Callable[[], tuple[str, list[str]]], device: torch.device) -> Iterator[None]:
    """Name the pack that memory did not suffice for.

    Args:
        describe: gives the pack's size in words, and its samples' keys.

    Raises:
        UserError: out of memory within the block.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        had = f"{torch.cuda.get_device_properties(device).total_memory / 1e9:.0f} GB" if device.type == "cuda" else ""
        size, keys = describe()
        raise UserError(
            f"out of memory {had} at {size}",
            where=few(keys, SHOWN_KEYS),
            hint="A lower --tokens_per_pack needs less (raise --gradient_accumulation_steps to make up for it).",
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


_LAST_WORDS = "higgs_tune/last_words"


def _store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def together(rank: int, run: Callable[[], None]) -> None:
    """Run this rank's part; when a rank fails, the others stop with its reason.

    Raises:
        SystemExit: another rank is gone; its reason is printed.
    """
    try:
        run()
    except Stopped:
        raise
    except BaseException as error:
        if not dist.is_initialized():
            raise
        if not _lost_a_peer(error):
            with contextlib.suppress(Exception):
                _store().set(_LAST_WORDS, f"rank {rank}: {type(error).__name__}: {error}")
            raise
        reason = _last_words() or "without a word; was it killed, or out of host memory?"
        print(f"error: rank {rank} stops because another rank has stopped: {reason}", file=sys.stderr, flush=True)
        os._exit(1)  # kernels may hang in the dead rank's collectives


def _lost_a_peer(error: BaseException) -> bool:
    if isinstance(error, UserError):
        return False
    words = ("Connection", "connection", "Gloo", "gloo", "NCCL", "peer", "timed out", "Timed out")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    )


def _last_words(patience_s: float = 3.0) -> str:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            if _store().check([_LAST_WORDS]):
                return _store().get(_LAST_WORDS).decode(errors="replace")
        time.sleep(0.1)
    return ""
