"""Where a clip's bytes are: a file, base64 in the data, or a cell of a datasets folder."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
from functools import lru_cache
from pathlib import Path

from higgs_tune.preprocess.audio.clip import Clip
from higgs_tune.preprocess.audio.options import AudioOptions
from higgs_tune.preprocess.input.arrow import arrow_audio, arrow_cell
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.writer import file_sha256


def clip_source(clip: Clip, options: AudioOptions) -> Path | bytes:
    """The file to open, or its bytes where they are stored in the data itself.

    Raises:
        Reject: it is missing, no regular file, outside the allowed folders, or not base64.
    """
    cell = arrow_cell(clip.path)
    if clip.inline:
        return _inline_bytes(clip)
    if cell:
        return arrow_audio(_resolve_path(cell[0], clip.source, options), *cell[1:], clip.source)
    return _resolve_path(clip.path, clip.source, options)


def _inline_bytes(clip: Clip) -> bytes:
    try:
        return base64.b64decode("".join(clip.inline.split()), validate=True)  # encoders wrap lines
    except (binascii.Error, ValueError) as error:
        raise Reject("unreadable_audio", f"raw_audio is not base64: {error}", clip.source) from error


def _resolve_path(path: str, source: str, options: AudioOptions) -> Path:
    """The file to open: a regular file, below one of the roots where there are any."""
    try:
        real = Path(os.path.realpath(path))
        if options.roots and not any(real.is_relative_to(os.path.realpath(root)) for root in options.roots):
            raise Reject("outside_audio_root", f"expected a file below {options.roots[0]}, got {real}", source)
        if not stat.S_ISREG(Path(path).stat().st_mode):  # a pipe or a device would block, or never end
            raise Reject("unreadable_audio", f"not a regular file: {path}", source)
    except FileNotFoundError:
        raise Reject("missing_audio", f"no such file: {path}", source) from None
    except (OSError, ValueError) as error:
        raise Reject("unreadable_audio", f"cannot read {path!r:.200}: {error}", source) from error
    return Path(path)


def audio_sha256(path: str) -> str:
    """SHA-256 of the audio at a path, which may be a cell of a datasets folder.

    Raises:
        Reject: it is missing, or cannot be read.
    """
    return source_sha256(clip_source(Clip(path, path), AudioOptions(0.0, float("inf"))), path)


def source_sha256(source: Path | bytes, name: str) -> str:
    """SHA-256 of a file's bytes."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    try:
        status = source.stat()
        return _cached_digest(source, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise Reject("unreadable_audio", f"cannot read {source}: {error}", name) from error


@lru_cache(maxsize=4096)
def _cached_digest(path: Path, _size: int, _mtime_ns: int) -> str:
    """Many cuts of one long recording hash it once."""
    return file_sha256(path)
