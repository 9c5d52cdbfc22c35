"""What a person sees of a running higgs-preprocess: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

PLAIN_EVERY_S = 15.0


class Progress:
    """Counts of one phase at a time: clips or shards done, audio encoded, speed, rejects."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self._bar = RichProgress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self._task, self._unit, self._total, self._done = self._bar.add_task("", note=""), "", 0, 0
        self._phase, self._began, self._printed = "", time.monotonic(), time.monotonic()
        self.encoded_seconds, self.rejects = 0.0, 0

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, phase: str, total: int, unit: str) -> None:
        """Begin a phase of `total` units."""
        self._phase, self._unit, self._total, self._done = phase, unit, total, 0
        self._began = time.monotonic()
        self._bar.reset(self._task, total=total, description=phase, note="")

    def skip(self, count: int) -> None:
        """Units that an earlier run has done."""
        self._done += count
        self._bar.update(self._task, completed=self._done)

    def encoded(self, info: list[dict[str, Any]]) -> None:
        """A unit of clips is done."""
        self.encoded_seconds += sum(clip.get("seconds", 0.0) for clip in info)
        self.rejects += sum("reject" in clip for clip in info)
        speed = self.encoded_seconds / max(time.monotonic() - self._began, 1e-9)
        self.advance(len(info), f"{self.encoded_seconds / 3600:.2f} h, {speed:.1f}x real time, {self.rejects} rejects")

    def advance(self, count: int, note: str = "") -> None:
        """`count` more units are done."""
        self._done += count
        self._bar.update(self._task, completed=self._done, note=note)
        now = time.monotonic()
        if self._bar.disable and (now - self._printed > PLAIN_EVERY_S or self._done == self._total):
            self._printed = now
            tail = f": {note}" if note else ""
            print(f"{self._phase} {self._done}/{self._total} {self._unit}{tail}", file=sys.stderr, flush=True)
