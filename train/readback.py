"""What the host learns from the device without holding it up: values on their way, and time that it stood idle.

On a CPU everything has happened when a call returns, so there is nothing to wait for.
"""

from __future__ import annotations

import time
from types import TracebackType

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


class IdleTime:
    """Within the block the host waits: for how long has the device had nothing to do meanwhile?

    On a CPU that is the whole time. On a GPU it is the time between two marks in its queue, of which the first is
    reached when all that was queued before is done; a wait during which the queue never runs dry costs nothing.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        self._host_s = 0.0

    def __enter__(self) -> None:
        self._host_s = -time.perf_counter()
        if self._marks:
            self._marks[0].record()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._host_s += time.perf_counter()
        if self._marks:
            self._marks[1].record()

    def seconds(self) -> float:
        """Waits until the device has come to the end of the block."""
        if not self._marks:
            return self._host_s
        self._marks[1].synchronize()
        return self._marks[0].elapsed_time(self._marks[1]) / 1e3
