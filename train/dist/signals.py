"""Stop signals: the run saves a checkpoint and ends.

SIGTERM, SIGUSR1 and SIGHUP end it with exit code 75, so that a job system starts it again; SIGINT (Ctrl-C) with 130. A
second SIGINT ends it at once. A signal only sets a flag; all ranks agree on it once a step (test_signals.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

EXIT_REQUEUE = 75  # EX_TEMPFAIL: the job may be started again
EXIT_INTERRUPTED = 130
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
WORKER_GRACE_S = 60  # a loader process outlives SIGTERM by this, so that its rank can save
_FIRST_INTERRUPT = b"\nA checkpoint is saved after this step; Ctrl-C again ends at once.\n"
_SHOW_CURSOR = b"\x1b[?25h\n"  # the live display hides it


class Stopped(SystemExit):
    """A signal has stopped the run, after a checkpoint."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(exit_code)
        self.message = message


class StopSignal:
    """The stop signal that this process has received; false while there is none.

    Args:
        announces: whether the first Ctrl-C is answered on the terminal.
    """

    def __init__(self, *, announces: bool = False) -> None:
        self.name, self._announces = "", announces

    def __bool__(self) -> bool:
        return bool(self.name)

    @property
    def is_interrupt(self) -> bool:
        """Whether it was Ctrl-C: a person wants the run to end."""
        return self.name == signal.SIGINT.name

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the stop signals within the block, except those that the parent process lets us ignore (nohup)."""
        before = {}
        with contextlib.suppress(ValueError):  # only the main thread may install handlers
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        # torchrun turns a second Ctrl-C into SIGTERM for its ranks
        if self.name and (number == signal.SIGINT or (self.is_interrupt and number == signal.SIGTERM)):
            end_at_once()
        self.name = self.name or signal.Signals(number).name
        if self.is_interrupt and self._announces:
            with contextlib.suppress(OSError):
                os.write(2, _FIRST_INTERRUPT)


def end_at_once() -> NoReturn:
    """End this process and its loader processes. A save in progress leaves a temporary name only."""
    for child in multiprocessing.active_children():
        child.kill()
    with contextlib.suppress(OSError):
        if os.isatty(2):
            os.write(2, _SHOW_CURSOR)
    os._exit(EXIT_INTERRUPTED)


def outlive_stop_signals() -> None:
    """In a loader process: live on after a stop signal to the process group, because the trainer acts on it.

    The kernel ends the process with its trainer; else it would wait for ever to hand over its last batches.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_S))
