"""The files of a prepared folder: segments, recordings, accounting, decisions; who reads and writes them.

    DIR/config.json         the options, with every threshold
        segments.jsonl      one Segment a line, kept or not, in the order of recordings and time
        recordings.jsonl    one Recording a line, in the order in which they were given
        accounting.json     milliseconds and seconds of the input by fate; their sum is the input
        manifest.jsonl      the kept segments, for higgs-preprocess
        rejects.jsonl       one line a segment or recording that was left out: why, value, threshold
        decisions.jsonl     one Decision a line: what people said in review; later lines win; a rerun applies them
        report.html         the page
        work/               results of single stages, by content

Every file but decisions.jsonl is derived: it is written anew by each run, in full. Nothing heavy is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError

SEGMENTS, RECORDINGS, DECISIONS = "segments.jsonl", "recordings.jsonl", "decisions.jsonl"
ACCOUNTING, CONFIG, MANIFEST, REJECTS, REPORT = (
    *("accounting.json", "config.json", "manifest.jsonl", "rejects.jsonl", "report.html"),
)
TextSource = Literal["given", "aligned", "asr"]
Split = Literal["train", "val"]
Verdict = Literal["accept", "reject"]


@dataclass(frozen=True)
class RejectReason:
    """Why a segment is left out.

    Attributes:
        step: segment, text, quality, snr, clipping, sound, pace, language, agreement, duplicate, speaker or review;
            the steps of the funnel, in this order (`STEPS`).
        reason: a short fixed name to count by.
        value, threshold: what was measured and the bound that it missed, or what is wrong with a transcript; None
            where there is neither.
    """

    step: str
    reason: str
    value: float | str | None = None
    threshold: float | str | None = None


UNREADABLE_TRANSCRIPT = "unreadable_transcript"  # a reason
STEPS = (
    *("segment", "text", "quality", "snr", "clipping", "sound", "pace", "language", "agreement", "duplicate"),
    *("speaker", "review"),
)


@dataclass(frozen=True)
class Decision:
    """What a person said of one segment; None: nothing. Speakers are merged and split segment by segment.

    Attributes:
        id: of the segment.
        verdict: `accept` overrules the thresholds; `reject` leaves the segment out.
        text: the corrected transcript. speaker: the corrected name.
    """

    id: str
    verdict: Verdict | None = None
    text: str | None = None
    speaker: str | None = None


@dataclass(frozen=True)
class Segment:
    """One stretch of speech, and everything that is known of it. None: not measured.

    Attributes:
        id: `segment_id`. recording: the path as it was given. sha256: of the recording's file.
        start, end: seconds in the recording, whole milliseconds.
        text: what is said, normalised and with a person's correction; None without a transcript.
        text_source: given (beside the audio, for this stretch), aligned (a piece of a longer text), asr.
        asr_text: what the recogniser heard. cer: character error rate of `text` (or of a second recogniser) against it.
        quality: DNSMOS overall, 1 to 5. snr: dB. clipping: share of samples at full scale.
        sound: probability of music or another unwanted sound.
        seconds_per_char: duration by characters of the text without spaces.
        language: as the recogniser detected it. language_probability: 0 to 1.
        fingerprint: compact, of the audio; robust to gain and small shifts.
        duplicate_of: id of the segment that is kept in place of this one.
        embedding_map: x and y on the map of voices.
        ref: id of the segment that is its reference. split: None unless kept.
        reject: None if kept. decision: a person's, which was applied.
    """

    id: str
    recording: str
    sha256: str
    start: float
    end: float
    text: str | None = None
    text_source: TextSource | None = None
    asr_text: str | None = None
    cer: float | None = None
    quality: float | None = None
    snr: float | None = None
    clipping: float | None = None
    sound: float | None = None
    seconds_per_char: float | None = None
    language: str | None = None
    language_probability: float | None = None
    fingerprint: str | None = None
    duplicate_of: str | None = None
    speaker: str | None = None
    embedding_map: tuple[float, float] | None = None
    ref: str | None = None
    split: Split | None = None
    keep: bool = False
    reject: RejectReason | None = None
    decision: Decision | None = None

    @property
    def milliseconds(self) -> int:
        """The duration."""
        return round(self.end * 1000) - round(self.start * 1000)


@dataclass(frozen=True)
class Recording:
    """One input file. error: why it could not be used, or None; then rate and channels are its own.

    Attributes:
        path: as it was given. seconds: whole milliseconds; 0 where the length is not known.
    """

    path: str
    sha256: str
    seconds: float
    rate: int
    channels: int
    error: str | None = None


def segment_id(sha256: str, start_ms: int, end_ms: int) -> str:
    """First 12 characters of the recording's hash, start and end in milliseconds."""
    return f"{sha256[:12]}-{start_ms}-{end_ms}"


# reading and writing

T = TypeVar("T", Segment, Recording, Decision)


def write_lines(path: Path, lines: Iterable[Any]) -> None:
    """Write a JSONL file atomically; dataclasses become objects.

    Raises:
        UserError: the folder cannot be written.
    """
    with durable.atomic_file(path) as file:
        for line in lines:
            file.write(durable.to_json(line if isinstance(line, dict) else asdict(line)) + b"\n")


def read_segments(folder: Path) -> list[Segment]:
    """The segments of a prepared folder.

    Raises:
        UserError: there is no such file, or a line has another form.
    """
    return read_segments_file(folder / SEGMENTS)


def read_segments_file(file: Path) -> list[Segment]:
    """The segments of a file of one a line; raises as `read_segments`."""
    return list(_read(file, Segment))


def read_recordings(folder: Path) -> list[Recording]:
    """The recordings of a prepared folder; raises as `read_segments`."""
    return list(_read(folder / RECORDINGS, Recording))


def read_decisions(folder: Path) -> dict[str, Decision]:
    """People's decisions by segment, each field from the last line that has it; empty without the file."""
    joined: dict[str, Decision] = {}
    if (folder / DECISIONS).is_file():
        for line in _read(folder / DECISIONS, Decision):
            said = {name: value for name, value in asdict(line).items() if value is not None}
            joined[line.id] = Decision(**(asdict(joined.get(line.id, Decision(line.id))) | said))
    return joined


def _read(path: Path, kind: type[T]) -> Iterator[T]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        hint = "Give the --out of an earlier higgs-prepare."
        raise UserError(f"cannot read: {error.strerror}", where=path, hint=hint) from error
    for number, line in enumerate(lines, 1):
        try:
            yield _typed(json.loads(line), kind)
        except (ValueError, TypeError) as error:
            names = ", ".join(item.name for item in fields(kind))
            raise UserError(f"line {number} has the wrong content: {error}", where=path, expected=names) from error


def _typed(value: Any, kind: type[T]) -> T:
    if not isinstance(value, dict):
        raise TypeError("no object")
    if kind is Segment:
        for name, inner in (("reject", RejectReason), ("decision", Decision)):
            if value.get(name) is not None:
                value[name] = inner(**value[name])
        if value.get("embedding_map") is not None:
            x, y = value["embedding_map"]
            value["embedding_map"] = (x, y)
    return kind(**value)
