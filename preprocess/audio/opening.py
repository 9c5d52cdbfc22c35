"""Opens audio whole: by libsndfile from the file itself, or part by part where that would lose something."""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import soundfile
from higgs_tune.preprocess.audio import mp3
from higgs_tune.preprocess.audio.containers import is_whole, skip_tags, split
from higgs_tune.preprocess.audio.parts import Data, FileData, JoinedAudio, LengthMismatch, Part, PartFile
from higgs_tune.preprocess.filetype import HEAD_BYTES, file_kind
from higgs_tune.preprocess.reject import Reject

AudioFile = soundfile.SoundFile | JoinedAudio
Parts = tuple[Part, ...]
CLOSE_FRAMES = 2 * 1152  # an estimate of an mp3's length that is this close is taken
_ERRORS = (soundfile.SoundFileError, RuntimeError, ValueError, OverflowError, TypeError, OSError, IndexError)


@contextmanager
def open_audio(source: Path | bytes, name: str) -> Iterator[AudioFile]:
    """An open audio file; errors on opening, and of libsndfile on reading, become rejects.

    Args:
        source: the file, or its bytes.
        name: of the file, in rejects.

    Raises:
        Reject: it is not audio, not whole, or holds recordings of different rates or channels.
    """
    data: Data = b""
    with ExitStack() as stack:
        try:
            data = source if isinstance(source, bytes) else FileData(stack.enter_context(source.open("rb")))
            yield _open(stack, source, data, name)
        except LengthMismatch as mismatch:
            raise Reject("truncated_audio", str(mismatch), name) from mismatch
        except _ERRORS as error:
            raise Reject("unreadable_audio", _reason(data, name, error), name) from error


def _open(stack: ExitStack, source: Path | bytes, data: Data, name: str) -> AudioFile:
    parts = _parts_of(source, data)
    if not parts:
        file = _open_whole(stack, source)
        if file.format != "MP3" or mp3.begins_here(data, skip_tags(data, 0)):
            return file
        parts = tuple(mp3.recordings(data, 0, synced=False))  # other bytes stand before the first frame
        if not parts:
            return file
    if len(parts) == 1 and parts[0].frames is not None:
        file = _open_whole(stack, source)
        if abs(file.frames - parts[0].frames) <= CLOSE_FRAMES:
            return file
    files = [_open_part(stack, data, part) for part in parts]
    for file, part in zip(files, parts, strict=True):
        if part.frames is not None and abs(file.frames - part.frames) > CLOSE_FRAMES:
            raise LengthMismatch(f"libsndfile finds {file.frames} samples, the mp3 frames hold {part.frames}")
    forms = [f"{file.samplerate} Hz {'mono' if file.channels == 1 else f'{file.channels} channels'}" for file in files]
    if len(set(forms)) > 1:
        shown = ", then ".join(form for i, form in enumerate(forms) if not i or form != forms[i - 1])
        detail = f"the file holds {len(files)} recordings of different form: {shown:.200}; split it, or convert each"
        raise Reject("joined_audio", detail, name)
    return JoinedAudio(files) if len(files) > 1 else files[0]


def _open_whole(stack: ExitStack, source: Path | bytes) -> soundfile.SoundFile:
    return stack.enter_context(soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source))


def _open_part(stack: ExitStack, data: Data, part: Part) -> soundfile.SoundFile:
    opened: Any = PartFile(data, part)  # libsndfile takes any file-like object
    return stack.enter_context(soundfile.SoundFile(opened))


def _parts_of(source: Path | bytes, data: Data) -> Parts:
    """The parts to be opened one by one; none if libsndfile reads the file itself right."""
    if isinstance(source, bytes):
        return _find_parts(data)
    status = source.stat()
    return _cached_parts(source, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _cached_parts(path: Path, _size: int, _mtime_ns: int) -> Parts:
    """Many cuts of one long recording look through it once."""
    with path.open("rb") as file:
        return _find_parts(FileData(file))


def _find_parts(data: Data) -> Parts:
    parts = split(data)
    return () if len(parts) == 1 and is_whole(data, parts[0]) else tuple(parts)


def _reason(data: Data, name: str, error: BaseException) -> str:
    """What is wrong, and what the file really is."""
    try:
        kind = file_kind(data[:HEAD_BYTES])
    except OSError:
        kind = ""
    if not kind:  # the error itself names an object's address where there is no file of its own
        return f"not audio that libsndfile reads: {getattr(error, 'error_string', error)}"
    if not name.startswith("inline:"):
        base = Path(name)
        kind = kind.replace("IN", shlex.quote(base.name)).replace("OUT.flac", shlex.quote(f"{base.stem}.flac"))
    return f"not audio that libsndfile reads, but {kind}"
