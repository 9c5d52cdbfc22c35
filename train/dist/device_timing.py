"""Non-blocking copies to the host, and timing by CUDA events.

A CPU has finished its work when a call returns, so there nothing is waited for and the host's clock serves.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class HostCopy:
    """A tensor's present values, being copied to pinned host memory."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values, self._copied = values.detach(), None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values, self._copied = host.copy_(values, non_blocking=True), torch.cuda.Event()
            self._copied.record()

    @property
    def is_ready(self) -> bool:
        return self._copied is None or self._copied.query()

    def wait(self) -> torch.Tensor:
        """The values, on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


class Timestamp:
    """On a GPU, the time at which the device finishes the work queued so far; on a CPU, now."""

    def __init__(self, device: torch.device) -> None:
        self._at_s, self._event = time.perf_counter(), None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def seconds_until(self, later: Timestamp) -> float:
        """Seconds from here to a later timestamp; waits until the device has reached both."""
        if self._event is None or later._event is None:
            return later._at_s - self._at_s
        later._event.synchronize()
        return self._event.elapsed_time(later._event) / 1e3


class Stopwatch:
    """Adds up the time of blocks, by the device's clock.

    Around a wait for data it counts the time in which the device was idle: while work is still queued, the two
    timestamps follow each other at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._blocks = device, list[tuple[Timestamp, Timestamp]]()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of the block."""
        began = Timestamp(self._device)
        yield
        self._blocks.append((began, Timestamp(self._device)))

    def seconds(self) -> float:
        """The sum; waits until the device has finished the last block."""
        return sum(began.seconds_until(ended) for began, ended in self._blocks)
