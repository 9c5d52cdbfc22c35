"""What the host learns from the device without holding it up: values on their way, and times by the device's clock.

On a CPU everything has happened when a call returns, so there is nothing to wait for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Readback:
    """A tensor's values of now, on their way to the host."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values, self._arrived = values.detach(), None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values, self._arrived = host.copy_(values, non_blocking=True), torch.cuda.Event()
            self._arrived.record()

    @property
    def there(self) -> bool:
        return self._arrived is None or self._arrived.query()

    def wait(self) -> torch.Tensor:
        """The values, on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values


class Mark:
    """A moment: on a GPU, when it comes to the end of what has been queued so far; on a CPU, now."""

    def __init__(self, device: torch.device) -> None:
        self._at_s, self._event = time.perf_counter(), None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def until(self, later: Mark) -> float:
        """Seconds from this moment to a later one; waits until the device has come to both."""
        if self._event is None or later._event is None:
            return later._at_s - self._at_s
        later._event.synchronize()
        return self._event.elapsed_time(later._event) / 1e3


class Stopwatch:
    """Adds up the time of blocks, by the device's clock. Of a host that waits for data this is the time in which the
    device had nothing to do: while its queue does not run dry, two marks in it are next to each other."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pairs = device, list[tuple[Mark, Mark]]()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the time of the block."""
        began = Mark(self._device)
        yield
        self._pairs.append((began, Mark(self._device)))

    def seconds(self) -> float:
        """The sum; waits until the device has come to the end of the last block."""
        return sum(began.until(ended) for began, ended in self._pairs)
