"""MPEG audio (mp3) frame by frame: its real length, and the recordings that were joined in it.

libsndfile believes the count of frames in the first Xing header, or takes the bit rate of the first frame for all.
Here all frames are counted. ID3, APE and Lyrics3 tags, and bytes that are no frames, are skipped wherever they stand.
Frame header: ISO/IEC 11172-3, 2.4.1.3; Xing and VBRI headers: http://gabriel.mp3-tech.org/mp3infotag.html.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from higgs_tune.preprocess.audio.parts import Data, LengthMismatch, Part

_KBITS = {  # by MPEG version (1, or 2 and 2.5) and layer
    (1, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES_HZ = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
TOLERANCE = 1  # frames: some writers count the header's own frame, or a last one that is cut
CONFIRM = 3  # frames in a row that make a beginning, where bytes that are no frames came before


class Form(NamedTuple):
    """What all frames of one recording have in common."""

    version: int
    layer: int
    rate_hz: int
    channels: int


class Frame(NamedTuple):
    """One frame by its header. size: bytes; samples: of each channel; xing: where a Xing header would stand."""

    form: Form
    size: int
    samples: int
    xing: int


@lru_cache(maxsize=4096)
def _parse(b1: int, b2: int, b3: int) -> Frame | None:
    """A frame by the three bytes after 0xff; None if they are no header, or of a free bit rate."""
    version, layer, rate = b1 >> 3 & 3, 4 - (b1 >> 1 & 3), b2 >> 2 & 3
    if b1 & 0xE0 != 0xE0 or version == 1 or layer == 4 or rate == 3 or b2 >> 4 in (0, 15):
        return None
    first = version == 3
    kbits, rate_hz = _KBITS[1 if first else 2, layer][b2 >> 4], _RATES_HZ[version][rate]
    samples = 384 if layer == 1 else 1152 if first or layer == 2 else 576
    padding = b2 >> 1 & 1
    size = (12000 * kbits // rate_hz + padding) * 4 if layer == 1 else samples // 8 * 1000 * kbits // rate_hz + padding
    mono = b3 >> 6 == 3
    side = (17 if mono else 32) if first else (9 if mono else 17)
    return Frame(Form(version, layer, rate_hz, 1 if mono else 2), size, samples, 4 + side)


def _frame_at(data: Data, at: int, size: int) -> Frame | None:
    if at + 4 > size or data[at] != 0xFF:
        return None
    return _parse(data[at + 1], data[at + 2], data[at + 3])


def skip_tag(data: Data, at: int) -> int:
    """The end of a tag that begins at `at` (ID3v2, ID3v1, APE, Lyrics3); `at` if none does."""
    head = data[at : at + 32]
    if head[:3] == b"ID3" and len(head) >= 10 and max(head[6:10]) < 0x80:
        body = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        return at + 10 + body + (10 if head[5] & 0x10 else 0)
    if head[:3] == b"TAG" and len(data) - at >= 128:
        return at + 128
    if head[:8] == b"APETAGEX" and len(head) == 32:
        is_header = head[23] & 0x20
        return at + 32 + (int.from_bytes(head[12:16], "little") if is_header else 0)
    if head[:11] == b"LYRICSBEGIN":
        end = data.find(b"LYRICS", at + 11)
        return at if end < 0 else end + 9
    return at


def begins_here(data: Data, at: int) -> bool:
    """Whether MPEG frames begin at `at`: several in a row, of one form."""
    size, form = len(data), None
    for _ in range(CONFIRM):
        frame = _frame_at(data, at, size)
        if frame is None or (form and frame.form != form):
            return form is not None and frame is None and (at >= size or skip_tag(data, at) > at)
        form, at = frame.form, at + frame.size
    return True


@dataclass
class _Recording:
    """Frames between two headers.

    info, stated: the header's frame, and the frames that it states; None without one. readable: libsndfile knows the
    header. last: where the last frame begins.
    """

    form: Form
    samples: int
    info: tuple[int, int] | None = None
    stated: int | None = None
    readable: bool = True
    frames: int = 0
    ranges: list[list[int]] = field(default_factory=list)
    last: int = 0

    def add(self, begin: int, end: int, *, whole: bool) -> None:
        """Add a frame."""
        self.last, self.frames = begin, self.frames + whole
        if self.ranges and self.ranges[-1][1] == begin:
            self.ranges[-1][1] = end
        else:
            self.ranges.append([begin, end])

    def cut(self, end: int) -> None:
        """The last frame ends early: it does not count."""
        if self.frames:
            self.frames -= 1
            self.ranges[-1][1] = end


def recordings(data: Data, at: int, *, synced: bool = True) -> list[Part]:
    """The recordings in MPEG frames from `at` on, each to be decoded for itself; empty if no frames are found.

    Args:
        synced: whether a frame begins at `at`.

    Raises:
        LengthMismatch: a recording has fewer frames than its header states.
    """
    walked = _walk(data, at, synced=synced)
    return [
        _part(data, recording) for recording in walked if recording.frames or (recording.stated and len(walked) > 1)
    ]


def _begin_within(data: Data, begin: int, end: int) -> int | None:
    """Where frames begin within the frame from `begin` to `end`: it was cut, and another file joined to it."""
    at = begin + 4
    while 0 <= (at := data.find(b"\xff", at)) < end:
        if begins_here(data, at):
            return at
        at += 1
    return None


def _walk(data: Data, at: int, *, synced: bool) -> list[_Recording]:
    made: list[_Recording] = []
    size = len(data)
    while at + 4 <= size:
        frame = _frame_at(data, at, size)
        if frame is None or not (synced or begins_here(data, at)):
            end = skip_tag(data, at)
            if end == at:
                next_file = _begin_within(data, made[-1].last, at) if synced and made else None
                if next_file is not None:
                    made[-1].cut(next_file)
                synced, end = False, data.find(b"\xff", at + 1) if next_file is None else next_file
                end = size if end < 0 else end
            at = end
            continue
        synced, end = True, min(at + frame.size, size)
        stated = _stated_frames(data, at, frame)
        if stated is not None or not made or made[-1].form != frame.form:
            made.append(_Recording(frame.form, frame.samples))
        if stated is not None:
            made[-1].info, made[-1].stated = (at, end), stated
            made[-1].readable = data[at + 36 : at + 40] != b"VBRI"
        else:
            made[-1].add(at, end, whole=at + frame.size <= size)
        at += frame.size
    return made


def _stated_frames(data: Data, at: int, frame: Frame) -> int | None:
    """Frames by the Xing, Info or VBRI header in this frame; 0 if it leaves them open, None if it is no header."""
    if frame.form.layer != 3:
        return None
    place = at + frame.xing
    if data[place : place + 4] in (b"Xing", b"Info"):
        return int.from_bytes(data[place + 8 : place + 12], "big") if data[place + 7] & 1 else 0
    if data[at + 36 : at + 40] == b"VBRI":
        return int.from_bytes(data[at + 50 : at + 54], "big")
    return None


def _part(data: Data, recording: _Recording) -> Part:
    """The bytes that decode to all frames: with its own header where that is right, else with a new one."""
    frames, stated = recording.frames, recording.stated or 0
    if stated > frames + TOLERANCE:
        raise LengthMismatch(f"the header states {stated} mp3 frames, the file has {frames}")
    ranges = tuple((begin, end) for begin, end in recording.ranges)
    if recording.info and recording.readable and stated >= frames - TOLERANCE:
        return Part((recording.info, *ranges))
    if recording.form.layer != 3:
        return Part(ranges, frames=frames * recording.samples)
    return Part(ranges, _xing_frame(data, ranges[0][0], frames), frames * recording.samples)


def _xing_frame(data: Data, at: int, frames: int) -> bytes:
    """A silent frame like that at `at`, with a Xing header that states the number of frames."""
    frame = _frame_at(data, at, len(data))
    assert frame is not None
    made = bytearray(frame.size)
    made[:4] = bytes((0xFF, data[at + 1] | 1, data[at + 2], data[at + 3]))  # without a checksum
    made[frame.xing : frame.xing + 12] = b"Xing" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    return bytes(made)
