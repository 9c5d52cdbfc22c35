"""Splits long texts at sentences, into pieces that are spoken one by one.

In: a text. Out: pieces of whole sentences, as long as a limit allows. A sentence beyond the limit is split at its
clauses, a clause at its spaces, a word without an end anywhere. Guarantees (test_speak_lists.py): joined by spaces, the
pieces are the text, but for spaces.

A tag such as `[SPEAKER1]` holds until the next one; a piece that begins within a speaker's part gets the tag again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_CLOSING = "\"'»”’)\\]}"
_SENTENCE = re.compile(
    rf"(?<=[.!?؟۔…।])[{_CLOSING}]*\s+|(?<=[。！？])[{_CLOSING}」』）]*\s*|\s*\n\s*|\s+(?=\[SPEAKER\d+\])"
)
_CLAUSE = re.compile(r"(?<=[,;:،؛—–-])\s+|(?<=[，；：、])\s*")
_SPACE = re.compile(r"\s+")
SPEAKER_TAG = re.compile(r"\[SPEAKER\d+\]")


def split_text(text: str, max_chars: int) -> list[str]:
    """The pieces of a text, each of at most `max_chars` characters (a repeated tag not counted)."""
    text = text.strip()
    return [text] if len(text) <= max_chars else list(_with_tags(_pack(_parts(text, max_chars), max_chars)))


def _parts(text: str, max_chars: int) -> Iterator[str]:
    """Sentences; parts of those that are too long."""
    for sentence in _cut(text, _SENTENCE):
        if len(sentence) <= max_chars:
            yield sentence
            continue
        for clause in _pack(_cut(sentence, _CLAUSE), max_chars):
            if len(clause) <= max_chars:
                yield clause
                continue
            for words in _pack(_cut(clause, _SPACE), max_chars):
                yield from (words[at : at + max_chars] for at in range(0, len(words), max_chars))


def _cut(text: str, boundary: re.Pattern[str]) -> Iterator[str]:
    """The parts between boundaries; closing marks stay with the part before them."""
    start = 0
    for match in boundary.finditer(text):
        part = text[start : match.end()].strip()
        if part:
            yield part
        start = match.end()
    if text[start:].strip():
        yield text[start:].strip()


def _pack(parts: Iterable[str], max_chars: int) -> Iterator[str]:
    """Neighbours joined by a space while they fit."""
    held = ""
    for part in parts:
        if held and len(held) + 1 + len(part) > max_chars:
            yield held
            held = part
        else:
            held = f"{held} {part}" if held else part
    if held:
        yield held


def _with_tags(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces that begin within a speaker's part, with the speaker's tag."""
    tag = ""
    for piece in pieces:
        yield piece if not tag or SPEAKER_TAG.match(piece) else f"{tag} {piece}"
        tag = next(iter(SPEAKER_TAG.findall(piece)[::-1]), tag)
