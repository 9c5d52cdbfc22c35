"""Turns a manifest into ChatML: each row becomes "speak this text in the voice of that clip".

In: rows with `audio`, `text`, `speaker` and, optionally, `ref_audio`, `ref_text`, `id`, and `offset` and `duration`,
which cut the row's piece out of its file, as `ref_offset` and `ref_duration` cut the reference; other columns go to
`misc`. Out: one ChatML entry for each row, in order.

Reference policy: a row's own `ref_audio` is its reference. Without one, the reference is another row's clip of the
same speaker: a different file or piece, at least `--ref_min_seconds` long, chosen by a hash of `--seed` and the row's
audio, so that it stays the same when other speakers come or go. Rows that are rejects by their columns or their audio's
header are not references. A hash also chooses the `--ref_drop` share of rows that get no reference. A row that is its
own reference, or whose speaker has no other clip, is a reject; a fault of its own audio is named first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import xxhash
from higgs_tune.preprocess.audio.audio import clip_seconds, header_seconds
from higgs_tune.preprocess.audio.clip import Clip
from higgs_tune.preprocess.config import Job
from higgs_tune.preprocess.input.chatml import check_local, check_storable, key_of, usable_text
from higgs_tune.preprocess.input.jsonable import plain
from higgs_tune.preprocess.input.layout import PromptLayout, Reference, build_conversation
from higgs_tune.preprocess.input.relayout import twins
from higgs_tune.preprocess.reject import Reject
from higgs_tune.preprocess.text_normalization import TextOptions

COLUMNS = ("audio", "text", "speaker", "ref_audio", "ref_text", "id", "offset")
REF_CUT = {"ref_offset": "offset", "ref_duration": "duration"}
HEADER_THREADS = 8
DISTINCT = "distinct_audio"  # marks an entry whose audios must differ in content, too
Row = dict[str, Any]


def to_chatml(rows: list[Any], job: Job) -> Iterator[Any]:
    """One entry, or Reject, for each row."""
    checked = [_checked(row, job.texts) for row in rows]
    references = References(checked, job)
    for number, row in enumerate(checked):
        try:
            if isinstance(row, Reject):
                raise row
            yield from _entries(row, references.of(row), job.config.prompt_layout or "chat", number)
        except Reject as reject:
            yield reject


def _checked(row: Any, texts: TextOptions) -> Row | Reject:
    try:
        return _usable(row, texts)
    except Reject as reject:
        return reject


def _usable(row: Any, texts: TextOptions) -> Row:
    """The row, with None in its empty cells, its text normalized and its cut in numbers.

    Raises:
        Reject: it is not a row, a column is missing or of a wrong type, or its text cannot be used.
    """
    if isinstance(row, Reject):
        raise row
    if not isinstance(row, dict):
        raise Reject("malformed_manifest", f"expected a row with columns, got {row!r:.60}")
    check_storable(row)
    row = {name: None if plain(value) in ("", None) else value for name, value in row.items()}  # NaN is no value
    if not isinstance(row.get("audio"), str):
        raise Reject("malformed_manifest", f"audio: expected a string, got {row.get('audio')!r:.60}")
    if row.get("text") is None:
        raise Reject("empty_text", "text is empty")
    if isinstance(row.get("speaker"), float) and row["speaker"].is_integer():
        row["speaker"] = int(row["speaker"])  # a column of numbers with gaps
    for name, kind in (("text", str), ("speaker", str | int), ("ref_audio", str), ("ref_text", str)):
        value = row.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise Reject("malformed_manifest", f"{name}: expected a string, got {value!r:.60}")
    if row.get("offset") is not None:
        row |= {name: _seconds(row.get(name), name) for name in ("offset", "duration")}
    if row.get("ref_offset") is not None:
        row |= {name: _seconds(row.get(name), name) for name in REF_CUT}
    return row | {"text": usable_text(row["text"], "row", texts)}


def _seconds(value: Any, name: str) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf or (name.endswith("duration") and not seconds):
        raise Reject("malformed_manifest", f"{name}: expected seconds, got {value!r:.60}")
    return seconds


def _cut(row: Row) -> dict[str, float]:
    """`offset` and `duration` of a row that is a piece of its file."""
    names = ("offset", "duration") if row.get("offset") is not None else ()
    return {name: row[name] for name in names if row.get(name) is not None}


def _own_reference(row: Row) -> Row:
    """The reference that a row names, as a row: its file, and its cut where it is a piece."""
    names = REF_CUT if row.get("ref_offset") is not None else {}
    return {"audio": row["ref_audio"]} | {name: row.get(theirs) for theirs, name in names.items()}


def _piece(row: Row) -> str:
    """The name of a row's audio, with its cut."""
    return "#".join([row["audio"], *(f"{seconds:g}" for seconds in _cut(row).values())])


class References:
    """Chooses the reference of each row.

    Args:
        rows: all rows; rejects stay in their places.
    """

    def __init__(self, rows: list[Row | Reject], job: Job) -> None:
        self.rows, self.job = rows, job
        self.paths, self.config = job.audio_paths, job.config
        self.clips_of = Counter(str(row.get("speaker")) for row in rows if isinstance(row, dict))
        self.candidates = self._candidates()

    def _clip(self, row: Row) -> Clip:
        cut = _cut(row)
        return Clip(row["audio"], self.paths.locate(row["audio"]), "", cut.get("offset"), cut.get("duration"))

    def _candidates(self) -> dict[str, list[int]]:
        """Numbers of the rows that may be references, by speaker."""
        by_speaker: dict[str, list[int]] = {}
        named = [row for row in self.rows if isinstance(row, dict)]
        if self.config.ref_drop >= 1 or all(row.get("ref_audio") is not None for row in named):
            return by_speaker
        spoken = [
            (i, row) for i, row in enumerate(self.rows) if isinstance(row, dict) and row.get("speaker") is not None
        ]
        shortest = max(self.config.ref_min_seconds, self.config.min_seconds)

        def long_enough(numbered: tuple[int, Row]) -> bool:
            seconds = clip_seconds(self._clip(numbered[1]), self.job.audio)
            return seconds is not None and shortest <= seconds <= self.config.max_seconds

        with ThreadPoolExecutor(HEADER_THREADS) as pool:
            for (i, row), good in zip(spoken, pool.map(long_enough, spoken), strict=True):
                if good:
                    by_speaker.setdefault(str(row["speaker"]), []).append(i)
        return by_speaker

    def of(self, row: Row) -> tuple[Row, str | None] | None:
        """(row whose audio is the reference, text or None); None without a reference (`--ref_drop`).

        Raises:
            Reject: the reference is the row itself, its text cannot be used, or there is none.
        """
        if _uniform(f"drop {self.config.seed} {_piece(row)}") < self.config.ref_drop:
            return None
        if row.get("ref_audio") is not None:
            own = _own_reference(row)
            if self._overlap(row, own):
                raise Reject("self_reference", "ref_audio is the row's own audio", row["audio"])
            text = row.get("ref_text")
            return own, text and usable_text(text, "ref_text", self.job.texts)
        clips = self.candidates.get(str(row.get("speaker")), [])
        start = int(_uniform(f"reference {self.config.seed} {_piece(row)}") * len(clips))
        for step in range(len(clips)):
            other = self.rows[clips[(start + step) % len(clips)]]
            assert isinstance(other, dict)
            if not self._overlap(row, other):
                return other, other["text"]
        check_local(row["audio"], "row")
        header_seconds(self._clip(row), self.job.audio)
        raise Reject("no_reference", self._why_none(row), row["audio"])

    def _overlap(self, one: Row, other: Row) -> bool:
        """Whether two rows share audio of one file."""
        if not self.paths.same_file(one["audio"], other["audio"]):
            return False
        (start, end), (first, last) = (_span(row) for row in (one, other))
        return start < last and first < end

    def _why_none(self, row: Row) -> str:
        speaker, least = row.get("speaker"), f"{self.config.ref_min_seconds:g} s"
        if speaker is None:
            return "the row names neither a speaker nor ref_audio"
        others = self.clips_of[str(speaker)] - 1
        unusable = f" ({others} others are too short, missing or unreadable, or the same file)" if others > 0 else ""
        return f"speaker {speaker!r:.60} has no other clip of at least {least}{unusable}"


def _span(row: Row) -> tuple[float, float]:
    """First and last second of a row's piece."""
    cut = _cut(row)
    start = cut.get("offset", 0.0)
    return start, start + cut.get("duration", math.inf)


def _uniform(name: str) -> float:
    """A number in [0, 1), a hash of the name."""
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass")) / 2**64


def _entries(
    row: Row, reference: tuple[Row, str | None] | None, layout: Literal["chat", "serve", "both"], number: int
) -> Iterator[dict[str, Any]]:
    """The ChatML entries of one row."""
    if layout == "both":
        yield from twins(_entry(row, reference, "chat"), _entry(row, reference, "serve"), key_of(row, number))
    else:
        yield _entry(row, reference, layout)


def _entry(row: Row, reference: tuple[Row, str | None] | None, layout: PromptLayout) -> dict[str, Any]:
    references = [Reference(_audio(reference[0]), reference[1])] if reference else []
    made = build_conversation(layout, row["text"], _audio(row), references)
    taken = {*COLUMNS, *_cut(row), *(REF_CUT if row.get("ref_offset") is not None else ())}
    misc = {name: plain(value) for name, value in row.items() if name not in taken and value is not None}
    entry = {"id": row.get("id"), **made, "speaker": row.get("speaker"), "misc": misc or None}
    return entry | {DISTINCT: True}


def _audio(row: Row) -> dict[str, Any]:
    """The audio part of a row."""
    return {"type": "audio", "audio_url": row["audio"], **_cut(row)}
