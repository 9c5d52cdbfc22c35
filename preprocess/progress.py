"""Progress display of a long command: a live bar on a terminal, a plain line every 15 s elsewhere.

Also the counts of one encoded unit, which the display sums up. Nothing heavy is imported here: higgs-inspect shows the
same bar.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from higgs_tune.preprocess.reject import Reject
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

if TYPE_CHECKING:
    from higgs_tune.preprocess.workdir import Encoded

PLAIN_EVERY_S = 15.0


@dataclass
class UnitStats:
    """Counts and times of one encoded unit of clips.

    Attributes:
        clips, rejects: counts.
        seconds: encoded audio, in seconds.
        flags: clips by flag.
        spent: seconds of work by kind; `decode` and `mel` ran in threads beside the others.
    """

    clips: int = 0
    rejects: int = 0
    seconds: float = 0.0
    flags: Counter[str] = field(default_factory=Counter)
    spent: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Count the time of the block as work of this kind."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add_time(kind, time.perf_counter() - began)

    def add_time(self, kind: str, seconds: float) -> None:
        self.spent[kind] = self.spent.get(kind, 0.0) + seconds

    def add_result(self, result: Encoded | Reject) -> None:
        """Count one clip."""
        self.clips += 1
        if isinstance(result, Reject):
            self.rejects += 1
            return
        self.seconds += result.info["seconds"]
        self.flags.update(result.info.get("flags", ()))


class ProgressBar:
    """Display of one phase at a time: clips or shards done, audio encoded, speed, rejects, time left.

    Attributes:
        encoded_seconds, rejects, flags, spent: sums over the units that this run encoded.
    """

    def __init__(self) -> None:
        note = TextColumn("{task.fields[note]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), note)
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
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
        """Count `count` units as done by an earlier run."""
        self._done = self._skipped = count
        self._bar.update(self._task, completed=count)

    def add_unit(self, stats: UnitStats) -> None:
        """Count a unit of clips as done."""
        self.encoded_seconds += stats.seconds
        self.rejects += stats.rejects
        self.flags.update(stats.flags)
        for name, seconds in stats.spent.items():
            self.spent[name] = self.spent.get(name, 0.0) + seconds
        hours, elapsed = self.encoded_seconds / 3600, max(time.monotonic() - self._began, 1e-9)
        speed = self.encoded_seconds / elapsed
        self.advance(stats.clips, f"{hours:.2f} h, {speed:.1f}x real time, {self.rejects} rejects")

    def advance(self, count: int, note: str = "") -> None:
        """Count `count` more units as done."""
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
