"""What a person sees of a running higgs-preprocess: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichBar

if TYPE_CHECKING:  # encode imports torch, and inspect shows bars without it
    from higgs_tune.preprocess.encode import UnitReport

PLAIN_EVERY_S = 15.0


class ProgressBar:
    """Counts of one phase at a time: clips or shards done, audio encoded, speed, rejects, time left.

    Attributes:
        encoded_seconds, rejects, flags, spent: sums over the units that this run encoded.
    """

    def __init__(self) -> None:
        note = TextColumn("{task.fields[note]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), note)
        self._bar = RichBar(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self._task, self._unit = self._bar.add_task("list", total=None, note=""), ""
        self._total, self._done, self._skipped = 0, 0, 0
        self._phase, self._began, self._printed = "", time.monotonic(), time.monotonic()
        self.encoded_seconds, self.rejects = 0.0, 0
        self.flags = Counter[str]()
        self.spent: dict[str, float] = {}

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, phase: str, total: int, unit: str) -> None:
        """Begin a phase of `total` units."""
        self._phase, self._unit, self._total, self._done, self._skipped = phase, unit, total, 0, 0
        self._began = time.monotonic()
        self._bar.reset(self._task, total=total, description=phase, note="")

    def skip(self, count: int) -> None:
        """Units that an earlier run has done."""
        self._done = self._skipped = count
        self._bar.update(self._task, completed=count)

    def encoded(self, report: UnitReport) -> None:
        """A unit of clips is done."""
        self.encoded_seconds += report.seconds
        self.rejects += report.rejects
        self.flags.update(report.flags)
        for name, seconds in report.spent.items():
            self.spent[name] = self.spent.get(name, 0.0) + seconds
        hours, elapsed = self.encoded_seconds / 3600, max(time.monotonic() - self._began, 1e-9)
        speed = self.encoded_seconds / elapsed
        self.advance(report.clips, f"{hours:.2f} h, {speed:.1f}x real time, {self.rejects} rejects")

    def advance(self, count: int, note: str = "") -> None:
        """`count` more units are done."""
        self._done += count
        note = ", ".join(part for part in (note, f"{self._left()} left") if part)
        self._bar.update(self._task, completed=self._done, note=note)
        now = time.monotonic()
        if self._bar.disable and (now - self._printed > PLAIN_EVERY_S or self._done == self._total):
            self._printed = now
            print(f"{self._phase} {self._done}/{self._total} {self._unit}: {note}", file=sys.stderr, flush=True)

    def _left(self) -> str:
        """Time left at the mean pace of this run, h:mm:ss."""
        pace = (time.monotonic() - self._began) / max(self._done - self._skipped, 1)
        seconds = round(pace * (self._total - self._done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
