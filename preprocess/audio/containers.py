"""Splits an audio file into its recordings, and compares the length of each with its header.

In: the bytes of a file; nothing is decoded. Out: parts. libsndfile silently plays the rest of a file whose end is
missing, only the stated part of a WAV file with more samples, and the first of several files that were joined.
A WAV file is judged by its data chunk: the size of the whole file, which many recorders leave wrong, does not count.
Guarantees (tests/test_containers.py): headers that leave the length open, as those written to a pipe, are read to the
end; tags, padding and a few foreign bytes before and after do no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from higgs_tune.preprocess.audio import flac, mp3, ogg
from higgs_tune.preprocess.audio.parts import Data, LengthMismatch, Part

Order = Literal["little", "big"]
OPEN_SIZE = 0x7FFF0000  # sizes from here on (and 0) stand in headers of files that were written to a pipe
MAX_CHUNKS = 4096
FOREIGN_BYTES, FOREIGN_S = 8192, 0.25  # what may follow without a name; more would be samples
CUT_CHUNKS = (b"LIST", b"id3 ", b"ID3 ", b"bext", b"iXML", b"JUNK", b"_PMX", b"cue ", b"smpl")  # may lack their end
NEXT_FILE = (b"RIFF", b"RIFX", b"RF64", b"FORM", b"riff")  # no chunks, but files that were joined


class Chunk(NamedTuple):
    """A chunk of a RIFF-like file: its name, and where its content begins and ends by its header."""

    name: bytes
    begin: int
    end: int


def split(data: Data) -> list[Part]:
    """The recordings in a file; none for a file of another form.

    Raises:
        LengthMismatch: a recording holds less, or more, than its header states.
    """
    parts: list[Part] = []
    at = skip_tags(data, 0)
    while (read := _reader(data, at)) is not None:
        more, at = read(data, at)
        if not more:
            break
        parts += more
        at = _skip_padding(data, at)
    return parts


def is_whole(data: Data, part: Part) -> bool:
    """Whether a part with its own header is all of a file; libsndfile takes a part of what follows for samples."""
    begin = 0
    for first, end in part.ranges:
        if first != begin:
            return False
        begin = end
    return not part.head and part.frames is None and begin == len(data)


Recordings = tuple[list[Part], int]  # and where the container ends


def _reader(data: Data, at: int) -> Callable[[Data, int], Recordings] | None:
    """What reads the container that begins at `at`; None if none begins there."""
    magic, form = data[at : at + 4], data[at + 8 : at + 12]
    if magic in (b"RIFF", b"RIFX", b"RF64") and form == b"WAVE":
        return _wav
    if magic == b"FORM" and form in (b"AIFF", b"AIFC"):
        return _aiff
    if magic == b"riff" and data[at + 24 : at + 28] == b"wave":
        return _wave64
    readers = {b".snd": _au, flac.MAGIC: flac.recordings, b"OggS": ogg.links}
    return readers.get(magic) or (_mp3 if mp3.begins_here(data, at) else None)


def _mp3(data: Data, at: int) -> Recordings:
    return mp3.recordings(data, at), len(data)


def _aiff(data: Data, at: int) -> Recordings:
    stated = 8 + int.from_bytes(data[at + 4 : at + 8], "big")
    return _chunked(data, at, _iff_chunks(data, at + 12, "big"), b"SSND", stated)


def _wave64(data: Data, at: int) -> Recordings:
    stated = int.from_bytes(data[at + 16 : at + 24], "little")
    return _chunked(data, at, _wave64_chunks(data, at + 40), b"data", stated)


def _au(data: Data, at: int) -> Recordings:
    begin, length = (int.from_bytes(data[at + i : at + i + 4], "big") for i in (4, 8))
    return _chunked(data, at, iter([Chunk(b"data", at + begin, at + begin + length)]), b"data", 0)


def _skip_padding(data: Data, at: int) -> int:
    return skip_tags(data, _skip_zeros(data, at))


def skip_tags(data: Data, at: int) -> int:
    """The end of the tags that begin at `at`."""
    while (end := mp3.skip_tag(data, at)) > at:
        at = end
    return at


def _skip_zeros(data: Data, at: int) -> int:
    while at < len(data):
        block = data[at : at + (1 << 16)]
        rest = block.lstrip(b"\0")
        if rest:
            return at + len(block) - len(rest)
        at += len(block)
    return at


def _iff_chunks(data: Data, at: int, order: Order) -> Iterator[Chunk]:
    """Chunks of RIFF and AIFF: padded to even lengths, but some writers forget the padding."""
    for _ in range(MAX_CHUNKS):
        name, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], order)
        if len(name) < 4 or name in NEXT_FILE or not (name.isascii() and name.decode("ascii").isprintable()):
            return
        yield Chunk(name, at + 8, at + 8 + length)
        at += 8 + length
        if length % 2 and data[at : at + 1] == b"\0":
            at += 1


def _wave64_chunks(data: Data, at: int) -> Iterator[Chunk]:
    for _ in range(MAX_CHUNKS):
        name, length = data[at : at + 4], int.from_bytes(data[at + 16 : at + 24], "little")
        if len(name) < 4 or name in NEXT_FILE or length < 24:
            return
        yield Chunk(name, at + 24, at + length)
        at += (length + 7) // 8 * 8


def _chunked(data: Data, at: int, chunks: Iterator[Chunk], samples: bytes, stated: int) -> Recordings:
    """A file whose samples stand in a chunk of this name; `stated`: bytes of the whole by its header."""
    size, end, complete = len(data), at, False
    for chunk in chunks:
        if chunk.name == samples and (chunk.end == chunk.begin or chunk.end - chunk.begin >= OPEN_SIZE):
            return [Part(((at, size),))], size
        if chunk.end > size + 1:
            if chunk.name == samples:
                raise _cut_off(chunk, size)
            break
        end, complete = min(chunk.end, size), complete or chunk.name == samples
    if not complete and at + stated > size:
        raise LengthMismatch(f"the header states {stated} bytes, the file has {size - at}")
    return [Part(((at, end),))] if complete else [], end


def _cut_off(chunk: Chunk, size: int) -> LengthMismatch:
    states, holds = chunk.end - chunk.begin, max(0, size - chunk.begin)
    return LengthMismatch(f"the header states {states} bytes of samples, the file has {holds}")


def _wav(data: Data, at: int, /) -> Recordings:
    """A WAV file; no part where it has no data chunk, since libsndfile says what is wrong then."""
    order: Order = "big" if data[at : at + 4] == b"RIFX" else "little"
    size, large, per_second, chunk = len(data), 0, 0, None
    for chunk in _iff_chunks(data, at + 12, order):
        if chunk.name == b"ds64":
            large = int.from_bytes(data[chunk.begin + 8 : chunk.begin + 16], "little")
        elif chunk.name == b"fmt ":
            per_second = int.from_bytes(data[chunk.begin + 8 : chunk.begin + 12], order)
        elif chunk.name == b"data":
            break
    if chunk is None or chunk.name != b"data":
        stated = 8 + int.from_bytes(data[at + 4 : at + 8], order)
        if large or at + stated > size:
            raise LengthMismatch("the file ends before its samples")
        return [], at
    length = chunk.end - chunk.begin
    if length == 0xFFFFFFFF and 0 < large < 1 << 62:
        chunk, length = chunk._replace(end=chunk.begin + large), large
    elif (length == 0 and _chunks_end(data, chunk.begin, order) < size) or (
        length >= OPEN_SIZE and chunk.end > size + 1
    ):
        return _streamed_wav(data, at, chunk.begin, order)
    if chunk.end > size + 1:
        raise _cut_off(chunk, size)
    end = _chunks_end(data, chunk.end, order)
    rest = _skip_padding(data, end)
    if rest >= size or _reader(data, rest):
        return [Part(((at, end),))], end
    stated = at + 8 + int.from_bytes(data[at + 4 : at + 8], order)
    allowed = 0 if stated == size else max(FOREIGN_BYTES, int(FOREIGN_S * per_second))
    if size - end > allowed and data[end : end + 4] not in CUT_CHUNKS:
        raise LengthMismatch(f"the header states {length} bytes of samples, but {size - end} more follow")
    return [Part(((at, min(chunk.end, size)),))], size


def _chunks_end(data: Data, at: int, order: Order) -> int:
    """The end of the chunks that begin at `at`, or after a byte of padding, and lie within the file."""
    size = len(data)
    for begin in (at, at + 1):
        end = begin
        for chunk in _iff_chunks(data, begin, order):
            if chunk.end > size + 1:
                break
            end = min(chunk.end, size)
        if end > begin:
            return end
    return at


def _streamed_wav(data: Data, at: int, begin: int, order: Order) -> Recordings:
    """A WAV file that was written to a pipe: its samples go on to the end, or to the next file."""
    end, place = len(data), begin
    while (place := data.find(b"RIFF", place)) >= 0:
        if data[place + 8 : place + 16] == b"WAVEfmt ":
            end = place
            break
        place += 4
    head = bytearray(data[at:begin].replace(b"RF64", b"RIFF", 1).replace(b"ds64", b"JUNK", 1))
    head[-4:] = min(end - begin, 0xFFFFFFFF).to_bytes(4, order)
    return [Part(((begin, end),), bytes(head))], end
