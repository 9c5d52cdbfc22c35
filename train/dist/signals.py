"""Stop signals: the run saves a checkpoint and ends, so that it can be resumed.

A signal only sets a flag; all ranks agree on it once a step (test_faults.py).
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

EXIT_REQUEUE = 75  # EX_TEMPFAIL: the job may be started again
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
WORKER_GRACE_S = 60  # a loader process outlives a stop signal by this, so that its rank can save


class Stopped(SystemExit):
    """A signal has stopped the run, after a checkpoint: exit code 75."""

    def __init__(self) -> None:
        super().__init__(EXIT_REQUEUE)


class StopSignal:
    """The stop signal that this process has received; false while there is none."""

    def __init__(self) -> None:
        self.name = ""

    def __bool__(self) -> bool:
        return bool(self.name)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the stop signals within the block."""

        def receive(number: int, _frame: FrameType | None) -> None:
            self.name = signal.Signals(number).name

        try:
            before = {number: signal.signal(number, receive) for number in STOP_SIGNALS}
        except ValueError:  # only the main thread may install handlers
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def outlive_stop_signals() -> None:
    """In a loader process: live on after a stop signal to the process group, because the trainer acts on it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_S))
