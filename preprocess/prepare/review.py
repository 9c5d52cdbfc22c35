"""Review by people: what they see of a prepared folder, and what they decide.

In: a prepared folder. Out: lines of its `decisions.jsonl`, which the next run applies (`higgs-prepare --from DIR`).
Nothing else is written. A speaker is split or merged segment by segment, under a name that a person gives.

Guarantees: a decision that was answered is on the disk, whole (tests/test_prepare_review.py).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import Any

from higgs_tune.preprocess.prepare.records import DECISIONS, SEGMENTS, Decision, Segment, read_decisions
from higgs_tune.preprocess.prepare.report import clip_flac, page, read_prepared
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.durable import fsync_folder, to_json

MAX_ROWS, MAX_TEXT, MAX_NAME = 100, 20_000, 200  # segments, characters, characters
CLUSTER_NAME = re.compile(r"speaker-\d+")  # another run may give it to another voice
SORTS = {
    "cer": lambda row: -(row.cer if row.cer is not None else -1.0),
    "quality": lambda row: row.quality if row.quality is not None else 9.0,
    "pace": lambda row: -(row.seconds_per_char or 0.0),
    "longest": lambda row: -row.milliseconds,
}


class Refused(Exception):
    """A request that is not answered. status: of HTTP; the text is shown to the person."""

    def __init__(self, status: HTTPStatus, text: str = "") -> None:
        super().__init__(text or status.phrase)
        self.status = status


def append_decisions(folder: Path, decisions: Sequence[Decision]) -> None:
    """Add lines to `decisions.jsonl`: all of them durably, or none.

    Raises:
        OSError: the file cannot be written; it is as it was before.
    """
    path = folder / DECISIONS
    lines = b"".join(to_json({k: v for k, v in asdict(one).items() if v is not None}) + b"\n" for one in decisions)
    is_new = not path.exists()
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(lines) != len(lines):
                raise OSError("the disk took a part of the lines only")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise
    if is_new:
        fsync_folder(folder)


def drop_torn_line(folder: Path) -> None:
    """Remove what a power cut left of a last line; it was never answered."""
    path = folder / DECISIONS
    if path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


class Review:
    """The prepared folder, and what was decided so far. One lock guards both."""

    def __init__(self, folder: Path) -> None:
        drop_torn_line(folder)
        self.folder, self.lock, self.token = folder, threading.Lock(), secrets.token_urlsafe(24)
        self._stamp = 0
        self._read()

    def _read(self) -> None:
        """Read the folder again if another run has written it."""
        stamp = (self.folder / SEGMENTS).stat().st_mtime_ns if (self.folder / SEGMENTS).exists() else -1
        if stamp != self._stamp:
            self.prepared = read_prepared(self.folder)
            self.by_id = {segment.id: segment for segment in self.prepared.segments}
            self.decisions = read_decisions(self.folder)
            self._stamp = stamp

    def page(self) -> Iterable[str]:
        """The page, in pieces."""
        with self.lock:
            self._read()
            prepared = self.prepared
        return page(prepared, lambda segment: f"/clip/{segment.id}", token=self.token)

    def list(self, query: dict[str, str]) -> dict[str, Any]:
        """Segments by what they are shown, whose they are, and words they hold."""
        try:
            offset, count = int(query.get("offset", 0)), int(query.get("count", 25))
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST) from error
        if offset < 0 or not 0 < count <= MAX_ROWS:
            raise Refused(HTTPStatus.BAD_REQUEST)
        with self.lock:
            self._read()
            found = [s for s in self.prepared.segments if self._fits(s, query)]
            if key := SORTS.get(query.get("sort", "")):
                found.sort(key=key)
            speakers = sorted({name for s in self.prepared.segments if (name := self._speaker(s))})
            rows = [self.row(segment) for segment in found[offset : offset + count]]
            return {"rows": rows, "total": len(found), "speakers": speakers, "decided": len(self.decisions)}

    def _fits(self, segment: Segment, query: dict[str, str]) -> bool:
        show, speaker, words = (query.get(name, "") for name in ("show", "speaker", "query"))
        step = segment.reject.step if segment.reject else ""
        shown = {
            "": True,
            "kept": segment.keep,
            "rejected": not segment.keep,
            "decided": segment.id in self.decisions,
        }.get(show, step == show)
        if not shown or (speaker and self._speaker(segment) != speaker):
            return False
        texts = (self._text(segment), segment.asr_text, segment.recording, segment.id)
        return not words or any(words.casefold() in text.casefold() for text in texts if text)

    def _decision(self, segment: Segment) -> Decision:
        return self.decisions.get(segment.id, Decision(segment.id))

    def _text(self, segment: Segment) -> str | None:
        return self._decision(segment).text or segment.text

    def _speaker(self, segment: Segment) -> str | None:
        return self._decision(segment).speaker or segment.speaker

    def row(self, segment: Segment) -> dict[str, Any]:
        """A segment as the list shows it, with what was decided since."""
        reject = segment.reject
        return {
            "id": segment.id,
            "recording": Path(segment.recording).name,
            "start": segment.start,
            "seconds": segment.milliseconds / 1000,
            "text": self._text(segment),
            "asr_text": segment.asr_text,
            "speaker": self._speaker(segment),
            "split": segment.split,
            "keep": segment.keep,
            "reason": f"{reject.step}: {reject.reason}".replace("_", " ") if reject else "",
            "verdict": self._decision(segment).verdict,
            "measured": {name: getattr(segment, name) for name in ("quality", "snr", "cer", "seconds_per_char")},
        }

    def decide(self, body: bytes) -> dict[str, Any]:
        """Write what a person decided: `{"decisions": […]}`, or `{"merge": [speakers], "speaker": name}`.

        Raises:
            Refused: it is of another form, or names a segment or speaker that there is not; nothing is written.
        """
        try:
            given = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(HTTPStatus.BAD_REQUEST, "not JSON") from error
        if not isinstance(given, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "expected an object")
        with self.lock:
            decisions = self._merged(given) if "merge" in given else self._single(given.get("decisions"))
            try:
                append_decisions(self.folder, decisions)
            except OSError as error:
                raise Refused(HTTPStatus.INSUFFICIENT_STORAGE, f"cannot write: {error}") from error
            for one in decisions:
                said = {name: value for name, value in asdict(one).items() if value is not None}
                self.decisions[one.id] = Decision(**(asdict(self.decisions.get(one.id, Decision(one.id))) | said))
            rows = [self.row(self.by_id[one.id]) for one in decisions[:MAX_ROWS]]
            return {"rows": rows, "written": len(decisions), "decided": len(self.decisions)}

    def _merged(self, given: dict[str, Any]) -> list[Decision]:
        """Every segment of these speakers gets one name."""
        names, speaker = given["merge"], _name(given.get("speaker"))
        if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) for name in names):
            raise Refused(HTTPStatus.BAD_REQUEST, "expected two speakers or more")
        segments = [segment for segment in self.prepared.segments if self._speaker(segment) in names]
        missing = set(names) - {self._speaker(segment) for segment in segments}
        if missing:
            raise Refused(HTTPStatus.BAD_REQUEST, f"no such speaker: {min(missing)}")
        return [Decision(segment.id, speaker=speaker) for segment in segments]

    def _single(self, given: Any) -> list[Decision]:
        if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
            raise Refused(HTTPStatus.BAD_REQUEST, "expected decisions")
        return [self._checked(one) for one in given]

    def _checked(self, given: dict[str, Any]) -> Decision:
        if given.keys() - {"id", "verdict", "text", "speaker"} or given.keys() <= {"id"}:
            raise Refused(HTTPStatus.BAD_REQUEST, "expected id and verdict, text or speaker")
        if not isinstance(given.get("id"), str) or given["id"] not in self.by_id:
            raise Refused(HTTPStatus.BAD_REQUEST, "no such segment; load the page again")
        if given.get("verdict", "accept") not in ("accept", "reject"):
            raise Refused(HTTPStatus.BAD_REQUEST, "expected accept or reject")
        return Decision(
            given["id"],
            verdict=given.get("verdict"),
            text=_words(given["text"], "a transcript", MAX_TEXT) if "text" in given else None,
            speaker=_name(given["speaker"]) if "speaker" in given else None,
        )

    @lru_cache(maxsize=64)  # noqa: B019 (one object lives as long as the process)
    def clip(self, key: str) -> bytes:
        """A segment's sound.

        Raises:
            Refused: no such segment, or its recording is gone.
        """
        segment = self.by_id.get(key)
        if segment is None:
            raise Refused(HTTPStatus.NOT_FOUND)
        try:
            return clip_flac(self.folder, segment)
        except (Reject, OSError) as error:
            raise Refused(HTTPStatus.NOT_FOUND, str(error)) from error


def _words(given: Any, what: str, most: int) -> str:
    """A text on one line."""
    text = " ".join(given.split()) if isinstance(given, str) else ""
    if not text or len(text) > most or any(0xD800 <= ord(mark) < 0xE000 or not ord(mark) for mark in text):
        raise Refused(HTTPStatus.BAD_REQUEST, f"expected {what} of 1 to {most:,} characters")
    return text


def _name(given: Any) -> str:
    """A speaker's name that no clustering gives: numbers of clusters change with the thresholds."""
    name = _words(given, "a name", MAX_NAME)
    if CLUSTER_NAME.fullmatch(name):
        raise Refused(HTTPStatus.BAD_REQUEST, "speaker-1, speaker-2 … are numbers of clusters; give another name")
    return name
