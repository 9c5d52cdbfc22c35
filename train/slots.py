"""Shared memory that loader processes write batches into, made once.

Handing a tensor from a process to another costs a new shared-memory file, a socket connection and its page faults each
time, which is more than making the batch. A ring of slots costs one copy.

In: batch number i, made by any process, into slot i modulo the number of slots. Out: the batch's integers in memory of
their own. Never: a slot that is written again before it was read; the loader sends at most `slots - 2` batches ahead.
"""

from __future__ import annotations

import torch


class SlotRing:
    """`slots` rows of `ints` int32 in shared memory; may be inherited by fork or sent to spawned processes once."""

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
