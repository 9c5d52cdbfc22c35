"""Parts of an audio file: one for a usual file, several where files were joined end to end (`cat a.mp3 b.mp3`).

Shapes: S samples, C channels.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, overload

import numpy as np
import soundfile

BLOCK = 1 << 16


class FileData:
    """A file's bytes, read by blocks when they are asked for; slices as of `bytes`."""

    def __init__(self, file: BinaryIO) -> None:
        self._fd, self._size = file.fileno(), os.fstat(file.fileno()).st_size
        self._begin, self._block = 0, b""

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, key: int) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> bytes: ...
    def __getitem__(self, key: int | slice) -> int | bytes:
        if isinstance(key, int):
            return self._read(key, key + 1)[0]
        begin, end, _ = key.indices(self._size)
        return self._read(begin, end) if end > begin else b""

    def _read(self, begin: int, end: int) -> bytes:
        if end - begin > BLOCK:
            return os.pread(self._fd, end - begin, begin)
        if begin < self._begin or end > self._begin + len(self._block):
            self._begin, self._block = begin, os.pread(self._fd, BLOCK, begin)
        return self._block[begin - self._begin : end - self._begin]

    def find(self, wanted: bytes, begin: int = 0) -> int:
        """As `bytes.find`."""
        while begin < self._size:
            block = self._read(begin, min(begin + BLOCK, self._size))
            if (at := block.find(wanted)) >= 0:
                return begin + at
            if begin + len(block) >= self._size or not block:
                return -1
            begin += len(block) - len(wanted) + 1
        return -1


Data = bytes | FileData


class LengthMismatch(Exception):
    """The file holds less, or more, than its header states; the text says how much."""


@dataclass(frozen=True)
class Part:
    """One recording within a file: its bytes are `head` and then the ranges (begin, end) of the file's bytes.

    frames: length in samples, where the file's own header does not tell it.
    """

    ranges: tuple[tuple[int, int], ...]
    head: bytes = b""
    frames: int | None = None


class PartFile(io.RawIOBase):
    """A part as a file for libsndfile."""

    def __init__(self, data: Data, part: Part) -> None:
        self._data, self._at = data, 0
        self._pieces: list[tuple[int, Data, int, int]] = []  # begin in the part, bytes, begin and end there
        self._size = 0
        for source, begin, end in ((part.head, 0, len(part.head)), *((data, *pair) for pair in part.ranges)):
            if end > begin:
                self._pieces.append((self._size, source, begin, end))
                self._size += end - begin

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view, done = memoryview(buffer), 0
        for first, source, begin, end in self._pieces:
            at = begin + self._at - first
            if begin <= at < end and done < len(view):
                chunk = source[at : min(end, at + len(view) - done)]
                view[done : done + len(chunk)] = chunk
                done += len(chunk)
                self._at += len(chunk)
        return done


class JoinedAudio:
    """Several recordings of one form, read one after the other; has what we use of `soundfile.SoundFile`."""

    def __init__(self, files: list[soundfile.SoundFile]) -> None:
        self.files = files
        self.samplerate, self.channels = files[0].samplerate, files[0].channels
        self.frames = sum(file.frames for file in files)
        self._at = 0

    def seek(self, frames: int) -> int:
        self._at = frames
        return frames

    def read(self, frames: int, dtype: Literal["float32"] = "float32", always_2d: bool = True) -> np.ndarray:
        """Samples [S, C]; stops where a part is shorter than its header states."""
        read_SC: list[np.ndarray] = []
        first = 0
        for file in self.files:
            begin, end = max(self._at, first), min(self._at + frames, first + file.frames)
            if begin < end:
                if begin > first or file.tell():  # a seek changes the last bits of an mp3's samples
                    file.seek(begin - first)
                read_SC.append(file.read(end - begin, dtype=dtype, always_2d=always_2d))
                if len(read_SC[-1]) < end - begin:
                    break
            first += file.frames
        samples_SC = np.concatenate(read_SC) if read_SC else np.zeros((0, self.channels), dtype)
        self._at += len(samples_SC)
        return samples_SC
