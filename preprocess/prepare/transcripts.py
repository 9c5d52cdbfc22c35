"""Transcripts beside recordings: plain text, SubRip, WebVTT, Whisper's JSON, NIST's CTM.

In: a recording's path. Out: what it says, in pieces with times where the form has them: words (JSON with word times,
CTM) or cues. Of several files beside one recording, the one with the finest times is taken.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from higgs_tune.preprocess.input.text_file import NO_TEXT, open_text
from higgs_tune.shards.errors import UserError

_TIME = re.compile(r"(?:(\d{1,4}):)?([0-5]?\d):([0-5]?\d)(?:[.,](\d{1,3}))?")
_ARROW = re.compile(r"^\s*(\S+)\s+-->\s+(\S+)")
_BROKEN_ARROW = re.compile(r"^\s*[\d:.,]+\s*-+>")
_NO_CUE = ("WEBVTT", "NOTE", "STYLE", "REGION")  # begin the blocks of WebVTT that hold no text
_VOICE = re.compile(r"<v(?:\.[^ >]*)?\s+([^>]+)>")
_TAG = re.compile(r"</?[a-zA-Z0-9:.][^>]*>|\{\\[^}]*\}")
MOST_SECONDS = 1e7  # a time beyond is damage
LATE_MS = 1000  # of a cue that begins after the recording's end: times are rounded
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
    except (OSError, UserError, UnicodeError) as error:
        raise BadTranscript(str(error).replace(NO_TEXT, "not text")) from error
    if _has_surrogate(text):
        raise BadTranscript("some lines are not UTF-8")
    kind, pieces = READERS[file.suffix.lower()](text)
    if any(_has_surrogate(piece.text + piece.speaker) for piece in pieces):
        raise BadTranscript("a text with half a surrogate pair")
    pieces = [piece for piece in pieces if piece.text.strip()]
    if not pieces:
        raise BadTranscript("it holds no text")
    if kind != "text":
        pieces.sort(key=lambda piece: piece.start)
    return Transcript(file, kind, tuple(pieces))


def _has_surrogate(text: str) -> bool:
    return any(0xD800 <= ord(mark) < 0xE000 for mark in text)


def refuse_later(transcript: Transcript, total_ms: int) -> None:
    """Refuse a transcript with times after the recording's end: it is of another one.

    Raises:
        BadTranscript: a piece begins more than `LATE_MS` after it.
    """
    last = transcript.pieces[-1]
    if last.start > total_ms + LATE_MS:
        raise BadTranscript(f"a text at {last.start / 1000:g} s, after the recording's end at {total_ms / 1000:g} s")


Read = tuple[Kind, list[Piece]]


def _plain(text: str) -> Read:
    return "text", [Piece(" ".join(text.split()))]


def _cues(text: str) -> Read:
    """SubRip and WebVTT: blocks of a line with times and lines of text; notes, styles and headers have no times.

    Another block without times goes on with the text before it, which has an empty line in it.
    """
    cues: list[tuple[int, list[str]]] = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        lines = block.strip().split("\n")
        if (number := _times_line(lines)) is not None:
            cues.append((number, lines))
        elif lines != [""] and not lines[0].startswith(_NO_CUE):
            if not cues or lines[0].strip().isdigit():
                raise BadTranscript(f"no line with times (00:00:01,000 --> 00:00:02,000) in the block {lines[0]:.40}")
            cues[-1][1].extend(lines)
    if not cues:
        raise BadTranscript("no line with times (00:00:01,000 --> 00:00:02,000)")
    return "cues", [_cue(number, lines) for number, lines in cues]


def _times_line(lines: list[str]) -> int | None:
    """Which of the first lines of a block has the times, perhaps broken ones."""
    return next((at for at, line in enumerate(lines[:3]) if _ARROW.match(line) or _BROKEN_ARROW.match(line)), None)


def _cue(number: int, lines: list[str]) -> Piece:
    """A block with times in line `number`: perhaps a header, name or number before them; text."""
    found, said = _ARROW.match(lines[number]), lines[number + 1 :]
    if not found:
        raise BadTranscript(f"expected times such as 00:00:01,000 --> 00:00:02,000, got {lines[number]:.40}")
    start, end = _milliseconds(found[1]), _milliseconds(found[2])
    if end < start:
        raise BadTranscript(f"a cue that ends before it begins: {lines[number]:.60}")
    if merged := next((line for line in said if (other := _ARROW.match(line)) and _TIME.fullmatch(other[1])), None):
        raise BadTranscript(f"no empty line before the cue {merged:.40}")
    joined = " ".join(said)
    voice = _VOICE.search(joined)
    plain = " ".join(html.unescape(_TAG.sub("", joined)).split())
    return Piece(plain, start, end, voice[1].strip() if voice else "")


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
    timed = [_word(word, item) for item in segments for word in _words(item)]
    if timed and all(timed) and all(_words(item) for item in segments if str(item.get("text", "")).strip()):
        return "words", [piece for piece in timed if piece]
    cues = [_piece(item, item.get("text"), item) for item in segments]
    if not all(cues):
        shown = json.dumps({name: segments[cues.index(None)].get(name) for name in ("start", "end", "text")})
        raise BadTranscript(f"a segment without start and end, in order and in seconds, and a text: {shown:.80}")
    return "cues", [piece for piece in cues if piece]


def _words(item: dict[str, Any]) -> list[Any]:
    words = item.get("words")
    return words if isinstance(words, list) else []


def _word(word: Any, item: dict[str, Any]) -> Piece | None:
    return _piece(word, word.get("word", word.get("text")), item) if isinstance(word, dict) else None


def _piece(times: dict[str, Any], text: Any, item: dict[str, Any]) -> Piece | None:
    start, end = _whole_ms(times.get("start")), _whole_ms(times.get("end"))
    if start is None or end is None or end < start or not isinstance(text, str):
        return None
    speaker = times.get("speaker") or item.get("speaker") or ""
    return Piece(" ".join(text.split()), start, end, str(speaker))


def _whole_ms(seconds: Any) -> int | None:
    """Milliseconds; None for what is no time."""
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    return round(seconds * 1000) if number and 0 <= seconds <= MOST_SECONDS else None


def _ctm(text: str) -> Read:
    """NIST's CTM: file, channel, start, duration, word, and maybe a confidence; `;;` begins a comment."""
    pieces: list[Piece] = []
    for number, line in enumerate(text.splitlines(), 1):
        cells = line.split()
        if not cells or line.startswith(";;"):
            continue
        try:
            begin, length = float(cells[2]), float(cells[3])
            word = cells[4]
        except (IndexError, ValueError) as error:
            raise BadTranscript(f"line {number}: expected file, channel, start, duration, word") from error
        start, end = _whole_ms(begin), _whole_ms(begin + length)
        if start is None or end is None or end < start:
            raise BadTranscript(f"line {number}: expected seconds, got {cells[2]:.20} {cells[3]:.20}")
        pieces.append(Piece(word, start, end))
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
