"""FLAC: where a recording ends, and how many samples its frames hold. libsndfile plays as many as the header states.

Layout of header, metadata blocks and frames: RFC 9639, sections 8 and 9.
"""

from __future__ import annotations

from higgs_tune.preprocess.audio.parts import Data, Part

MAGIC, HEADER = b"fLaC", 42  # bytes of the mark and of STREAMINFO, which comes first
BEGINS = (MAGIC + b"\x00\x00\x00\x22", MAGIC + b"\x80\x00\x00\x22")
TOTAL = (1 << 36) - 1  # bits of the number of samples
SEARCHED = 1 << 18  # bytes before the end, in which the last frame begins; tags may follow it
LONGEST_FRAME_HEADER = 16


def recordings(data: Data, at: int) -> tuple[list[Part], int]:
    """The recording from `at` on, and its end: the next header, or the end of the data.

    A header that states fewer samples than the frames hold is replaced by one that states them all.
    """
    end = min((place for begin in BEGINS if (place := data.find(begin, at + 8)) >= 0), default=len(data))
    header = data[at : at + HEADER]
    if len(header) < HEADER:
        return [Part(((at, end),))], end
    fields = int.from_bytes(header[18:26], "big")
    if 0 < fields & TOTAL < (held := _samples(data, at, end)):
        head = header[:18] + (fields & ~TOTAL | held).to_bytes(8, "big") + header[26:]
        return [Part(((at + HEADER, end),), head)], end
    return [Part(((at, end),))], end


def _samples(data: Data, at: int, end: int) -> int:
    """Samples up to the end of the last frame; 0 if no frame is found."""
    first = _first_frame(data, at)
    mark = data[first : first + 4]
    tail = data[max(first, end - SEARCHED) : end]
    place = len(tail)
    while (place := tail.rfind(mark[:2], 0, place)) >= 0:
        frame = tail[place : place + LONGEST_FRAME_HEADER]
        if len(frame) > 4 and frame[3] == mark[3] and frame[2] & 15 == mark[2] & 15 and (held := _frame_end(frame)):
            number, block = held
            fixed = int.from_bytes(data[at + 8 : at + 10], "big")  # frames but the last have this many
            return number * (1 if mark[1] & 1 else fixed) + block
    return 0


def _first_frame(data: Data, at: int) -> int:
    at += len(MAGIC)
    while len(block := data[at : at + 4]) == 4:
        at += 4 + int.from_bytes(block[1:], "big")
        if block[0] & 0x80:
            break
    return at


def _frame_end(header: bytes) -> tuple[int, int] | None:
    """A frame's number (of its first sample, or of the frame) and its samples; None if this is no frame header."""
    code, rate, size = header[2] >> 4, header[2] & 15, _number_size(header[4])
    extra = (1 if code == 6 else 2 if code == 7 else 0), (1 if rate == 12 else 2 if rate in (13, 14) else 0)
    crc_at = 4 + size + sum(extra)
    if not code or not size or len(header) <= crc_at or _crc8(header[:crc_at]) != header[crc_at]:
        return None
    number = header[4] if size == 1 else header[4] & (0x7F >> size)
    for byte in header[5 : 4 + size]:
        number = number << 6 | byte & 0x3F
    if code in (6, 7):
        return number, int.from_bytes(header[4 + size : 4 + size + extra[0]], "big") + 1
    return number, 192 if code == 1 else 576 << code - 2 if code < 6 else 256 << code - 8


def _number_size(first: int) -> int:
    """Bytes of a number that is coded as UTF-8 codes characters, by its first byte; 0 if none begins so."""
    ones = 8 - (first ^ 0xFF).bit_length()
    return 1 if ones == 0 else ones if 2 <= ones <= 7 else 0


def _crc8(data: bytes) -> int:
    """CRC-8 with the polynomial x⁸ + x² + x + 1."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 0x07 if crc & 0x80 else crc << 1) & 0xFF
    return crc
