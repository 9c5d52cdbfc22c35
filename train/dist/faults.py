"""Faults of a long run: steps that are not finite, memory that runs out, ranks that die.

Every rank acts on a fault with the others, and the message names the cause (test_faults.py).
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from higgs_tune.shards.errors import UserError, few
from higgs_tune.train.dist.device_timing import HostCopy
from higgs_tune.train.dist.last_words import record_cause
from higgs_tune.train.dist.signals import Stopped

SHOWN_KEYS = 8


@dataclass
class NonFiniteSteps:
    """Steps that were skipped because loss or gradient was not finite; they change no weight.

    count: of this run so far, the same on every rank once all steps are collected. pending: steps whose flags are
    still being copied from the device: number, samples of each micro-batch, flags.
    """

    limit: int
    rank: int
    count: int = 0
    pending: deque[tuple[int, list[list[str]], HostCopy]] = field(default_factory=deque)

    def record(self, step: int, keys: list[list[str]], finite: torch.Tensor) -> None:
        """Record a step, to be collected later.

        Args:
            keys: the samples of each micro-batch.
            finite: bool [1 + micro-batches], on the device: the gradient, then each micro-batch's loss.
        """
        self.pending.append((step, keys, HostCopy(finite)))

    def collect(self, *, until: int | None = None) -> None:
        """Count and report the steps that the device has finished, without waiting.

        Args:
            until: wait for the steps up to this one, and count no later ones.
        """
        while self.pending:
            step, keys, copy = self.pending[0]
            if not copy.is_ready if until is None else step > until:
                return
            finite = copy.wait()
            self.pending.popleft()
            if not finite[0]:
                self.count += 1
                self._warn(step, keys, finite[1:].tolist())

    def _warn(self, step: int, keys: list[list[str]], finite: list[bool]) -> None:
        packs = [few(pack, SHOWN_KEYS) for pack in keys]
        bad = [pack for pack, good in zip(packs, finite, strict=True) if not good]
        if bad or self.rank == 0:
            culprit = "; ".join(bad) if bad else f"no loss of rank {self.rank}'s packs: {'; '.join(packs)}"
            print(f"warning: step {step} is skipped ({self.count} so far): loss or gradient is not finite. "
                  f"Rank {self.rank}, pack of {culprit}", file=sys.stderr, flush=True)  # fmt: skip

    @property
    def too_many(self) -> bool:
        return self.count > self.limit

    def raise_error(self) -> NoReturn:
        hint = "A lower --learning_rate helps where training has diverged; see the packs named above."
        raise UserError("too many steps were not finite", expected=f"at most --max_bad_steps {self.limit}",
                        got=self.count, hint=hint)  # fmt: skip


@contextlib.contextmanager
def explain_out_of_memory(describe: Callable[[], tuple[str, list[str]]], device: torch.device) -> Iterator[None]:
    """Name the pack that did not fit into memory.

    Args:
        describe: returns the pack's size in words, and its samples' keys.

    Raises:
        UserError: out of memory within the block.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        memory = f"{torch.cuda.get_device_properties(device).total_memory / 1e9:.0f} GB" if device.type == "cuda" else ""
        size, keys = describe()
        raise UserError(
            f"out of memory {memory} at {size}",
            where=few(keys, SHOWN_KEYS),
            hint="A lower --tokens_per_pack needs less (raise --gradient_accumulation_steps to make up for it).",
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


_FAILURE_KEY = "higgs_tune/last_words"


def _store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def propagate_failures(rank: int, work: Callable[[], None]) -> None:
    """Do this rank's work. When a rank fails, the others print its error and exit with code 1."""
    try:
        work()
    except Stopped:
        raise
    except BaseException as error:
        if not dist.is_initialized():
            raise
        if not _lost_a_peer(error):
            with contextlib.suppress(Exception):
                _store().set(_FAILURE_KEY, f"rank {rank}: {type(error).__name__}: {error}")
            raise
        reason = _peers_failure() or "without a word; was it killed, or out of host memory?"
        message = f"error: rank {rank} stops because another rank has stopped: {reason}"
        record_cause(message, is_consequence=True)
        print(message, file=sys.stderr, flush=True)
        os._exit(1)  # kernels may hang in the dead rank's collectives


def _lost_a_peer(error: BaseException) -> bool:
    if isinstance(error, UserError):
        return False
    words = ("Connection", "connection", "Gloo", "gloo", "NCCL", "peer", "timed out", "Timed out")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    )


def _peers_failure(patience_s: float = 3.0) -> str:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            if _store().check([_FAILURE_KEY]):
                return _store().get(_FAILURE_KEY).decode(errors="replace")
        time.sleep(0.1)
    return ""
