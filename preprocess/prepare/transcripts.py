"""Transcripts beside recordings: plain text, SubRip, WebVTT, Whisper's JSON, NIST's CTM.

In: a recording's path. Out: what it says, in pieces with times where the form has them: words (JSON with word times,
CTM) or cues. Of several files beside one recording, the one with the finest times is taken.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from higgs_tune.preprocess.input.text_file import open_text
from higgs_tune.shards.errors import UserError

_TIME = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2})(?:[.,](\d{1,3}))?")
_ARROW = re.compile(r"^\s*(\S+)\s+-->\s+(\S+)")
_VOICE = re.compile(r"<v(?:\.[^ >]*)?\s+([^>]+)>")
_TAG = re.compile(r"</?[a-zA-Z0-9:.][^>]*>|\{\\[^}]*\}")
Kind = Literal["words", "cues", "text"]


@dataclass(frozen=True)
class Piece:
    """A word, a cue or a whole text. start, end: milliseconds; both 0 in a text without times. speaker: or empty."""

    text: str
    start: int = 0
    end: int = 0
    speaker: str = ""


@dataclass(frozen=True)
class Transcript:
    """What a recording says. file: where it was read. kind: what the pieces are."""

    file: Path
    kind: Kind
    pieces: tuple[Piece, ...]


class BadTranscript(Exception):
    """The file is there and cannot be used; the text says why."""


def find_transcript(recording: Path, folder: Path | None) -> Path | None:
    """The transcript of a recording: `NAME.srt` or `NAME.wav.srt` beside it, or in the folder of transcripts."""
    where = folder or recording.parent
    for suffix in READERS:
        for name in (f"{recording.stem}{suffix}", f"{recording.name}{suffix}"):
            file = where / name
            if file != recording and file.is_file():
                return file
    return None


def read_transcript(file: Path) -> Transcript:
    """Read a transcript by its suffix.

    Raises:
        BadTranscript: it is not text, not of its form, or says nothing.
    """
    try:
        with open_text(file) as stream:
            text = stream.read()
    except (OSError, UserError) as error:
        raise BadTranscript(str(error)) from error
    if any(0xD800 <= ord(mark) < 0xE000 for mark in text):
        raise BadTranscript("some lines are not UTF-8")
    kind, pieces = READERS[file.suffix.lower()](text)
    pieces = [piece for piece in pieces if piece.text.strip()]
    if not pieces:
        raise BadTranscript("it holds no text")
    if kind != "text":
        pieces.sort(key=lambda piece: piece.start)
    return Transcript(file, kind, tuple(pieces))


Read = tuple[Kind, list[Piece]]


def _plain(text: str) -> Read:
    return "text", [Piece(" ".join(text.split()))]


def _cues(text: str) -> Read:
    """SubRip and WebVTT: blocks of a line with times and lines of text; notes, styles and headers have no times."""
    pieces: list[Piece] = []
    blocks = re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\r", "\n"))
    for block in blocks:
        lines = block.strip("\n").split("\n")
        for number, line in enumerate(lines[:3]):
            if found := _ARROW.match(line):
                said = " ".join(lines[number + 1 :])
                voice = _VOICE.search(said)
                plain = " ".join(html.unescape(_TAG.sub("", said)).split())
                start, end = _milliseconds(found[1]), _milliseconds(found[2])
                pieces.append(Piece(plain, start, max(start, end), voice[1].strip() if voice else ""))
                break
    if not pieces:
        raise BadTranscript("no line with times (00:00:01,000 --> 00:00:02,000)")
    return "cues", pieces


def _milliseconds(stamp: str) -> int:
    found = _TIME.fullmatch(stamp)
    if not found:
        raise BadTranscript(f"expected a time such as 00:00:01,000, got {stamp:.40}")
    hours, minutes, seconds, part = found.groups()
    return ((int(hours or 0) * 60 + int(minutes)) * 60 + int(seconds)) * 1000 + int((part or "0").ljust(3, "0"))


def _whisper(text: str) -> Read:
    """Whisper's and WhisperX's JSON: `segments` with `start`, `end`, `text` and, optionally, `words`, `speaker`."""
    try:
        given: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadTranscript(f"not JSON: {error}") from error
    segments = given.get("segments") if isinstance(given, dict) else given
    if segments is None and isinstance(given, dict) and isinstance(given.get("text"), str):
        return _plain(given["text"])
    if not isinstance(segments, list) or not all(isinstance(item, dict) for item in segments):
        raise BadTranscript("expected an object with segments, as Whisper writes it")
    words = [(word, item) for item in segments for word in item.get("words") or ()]
    timed = [_piece(word, word.get("word", word.get("text")), item) for word, item in words if isinstance(word, dict)]
    if timed and all(timed) and all(item.get("words") for item in segments if str(item.get("text", "")).strip()):
        return "words", [piece for piece in timed if piece]
    cues = [_piece(item, item.get("text"), item) for item in segments]
    if not all(cues):
        raise BadTranscript("a segment without start, end and text")
    return "cues", [piece for piece in cues if piece]


def _piece(times: dict[str, Any], text: Any, item: dict[str, Any]) -> Piece | None:
    start, end = times.get("start"), times.get("end")
    if not all(isinstance(at, int | float) and math.isfinite(at) and at >= 0 for at in (start, end)):
        return None
    if not isinstance(text, str) or start is None or end is None:
        return None
    speaker = times.get("speaker") or item.get("speaker") or ""
    return Piece(" ".join(text.split()), round(start * 1000), round(max(start, end) * 1000), str(speaker))


def _ctm(text: str) -> Read:
    """NIST's CTM: file, channel, start, duration, word, and maybe a confidence; `;;` begins a comment."""
    pieces: list[Piece] = []
    for number, line in enumerate(text.splitlines(), 1):
        cells = line.split()
        if not cells or line.startswith(";;"):
            continue
        try:
            start, length = float(cells[2]), float(cells[3])
            word = cells[4]
        except (IndexError, ValueError) as error:
            raise BadTranscript(f"line {number}: expected file, channel, start, duration, word") from error
        if not 0 <= start < math.inf or not 0 <= length < math.inf:
            raise BadTranscript(f"line {number}: expected seconds, got {cells[2]:.20} {cells[3]:.20}")
        pieces.append(Piece(word, round(start * 1000), round((start + length) * 1000)))
    return "words", pieces


# by the fineness of their times
READERS: dict[str, Callable[[str], Read]] = {
    ".json": _whisper,
    ".ctm": _ctm,
    ".vtt": _cues,
    ".srt": _cues,
    ".txt": _plain,
}


def boundaries(transcript: Transcript) -> list[int] | None:
    """Where its text can be divided, in milliseconds and in order; None: anywhere."""
    if transcript.kind != "cues":
        return None
    return sorted({at for piece in transcript.pieces for at in (piece.start, piece.end)})


def turns(transcript: Transcript) -> list[int]:
    """Where one named speaker follows another, in milliseconds and in order."""
    return [two.start for one, two in pairwise(transcript.pieces) if one.speaker != two.speaker]


def text_between(transcript: Transcript, start: int, end: int) -> tuple[str, set[str]]:
    """Text and speakers (names, or empty) of the pieces whose middle lies in a stretch of milliseconds."""
    inside = [piece for piece in transcript.pieces if start <= (piece.start + piece.end) / 2 < end]
    return " ".join(piece.text for piece in inside), {piece.speaker for piece in inside}
