"""Compares the length of an audio file with its header.

In: an open file; nothing is decoded. Out: the mismatch in words, or an empty text. libsndfile silently plays the rest
of a WAV, AIFF, AU or Ogg file whose end is missing, and only the stated part of a WAV file with more samples.
Guarantees: headers that leave the length open, as those written to a pipe, are accepted (tests/test_bad_input.py).
"""

from __future__ import annotations

import os
from typing import BinaryIO, Literal

STREAMED_RIFF = 0x7FFF0000  # sizes from here on (and 0) stand in headers of files that were written to a pipe
UNKNOWN_AU = 0xFFFFFFFF
MAX_CHUNKS = 64  # of a WAV file, before its samples
OGG_PAGE, OGG_END = 65307, 4  # longest page in bytes; the flag of a stream's last page


def container_mismatch(file: BinaryIO) -> str:
    """How the file's length differs from its header; empty if they agree or the header states no length."""
    head, size = file.read(32), file.seek(0, os.SEEK_END)
    if head[:4] == b"OggS":
        return _ogg_mismatch(file, size)
    stated = _stated_bytes(head)
    if stated > size + 1:  # of the last chunk's padding, one byte may be missing
        return f"the header states {stated} bytes, the file has {size}"
    if head[:4] in (b"RIFF", b"RIFX") and head[8:12] == b"WAVE":
        return _data_mismatch(file, "little" if head[:4] == b"RIFF" else "big", stated, size)
    return ""


def _stated_bytes(head: bytes) -> int:
    """Length of the whole file by its header, in bytes; 0 if it states none or is of another format."""
    kind, form = head[:4], head[8:12]
    if kind in (b"RIFF", b"RIFX") and form == b"WAVE":
        body = int.from_bytes(head[4:8], "little" if kind == b"RIFF" else "big")
        return body + 8 if 0 < body < STREAMED_RIFF else 0
    if kind == b"RF64" and head[12:16] == b"ds64":
        body = int.from_bytes(head[20:28], "little")
        return body + 8 if body else 0
    if kind == b"FORM" and form in (b"AIFF", b"AIFC"):
        return int.from_bytes(head[4:8], "big") + 8
    if kind == b"riff":  # Wave64
        return int.from_bytes(head[16:24], "little")
    if kind == b".snd":
        samples = int.from_bytes(head[8:12], "big")
        return 0 if samples == UNKNOWN_AU else int.from_bytes(head[4:8], "big") + samples
    return 0


def _data_mismatch(file: BinaryIO, order: Literal["little", "big"], stated: int, size: int) -> str:
    """A WAV's data chunk that ends after the file, or before its samples do."""
    file.seek(12)
    for _ in range(MAX_CHUNKS):
        name, length = file.read(4), int.from_bytes(file.read(4), order)
        if name == b"data":
            break
        file.seek(length + length % 2, os.SEEK_CUR)
    else:
        return ""  # libsndfile says what is wrong with it
    begin = file.tell()
    if length >= STREAMED_RIFF:
        return ""
    if begin + length > size + 1:
        return f"the header states {length} bytes of samples, the file has {size - begin}"
    file.seek(begin + length)
    rest = file.read(min(max(stated - begin - length, 0), 1 << 16))
    named = any(part.isascii() and part.decode("ascii").isprintable() for part in (rest[:4], rest[length % 2 :][:4]))
    if named or not rest.strip(b"\0"):  # the next chunk, or padding
        return ""
    return f"the header states {length} bytes of samples, but {stated - begin - length} more follow"


def _ogg_mismatch(file: BinaryIO, size: int) -> str:
    file.seek(max(0, size - OGG_PAGE))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    sizes = page[27 : 27 + page[26]] if len(page) > 26 else b""
    whole = sizes and page[5] & OGG_END and len(page) >= 27 + len(sizes) + sum(sizes)
    return "" if whole else "the last page of the Ogg stream is missing"
