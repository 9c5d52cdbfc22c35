"""From an audio file to the waveform that the codec takes: mono float32 at the codec's rate.

In: a file (or bytes) that libsndfile reads: wav, flac, mp3, ogg, opus. Out: samples, length, hash and flags.
The mix-down and the resampling are librosa's (mean over channels, soxr HQ), as Boson's tokenizer calls it; a
cut takes the samples that `librosa.load(offset=…, duration=…)` takes.
Guarantees: a bad file raises `Reject` and nothing else (tests/test_bad_input.py).

Shapes: S samples, C channels.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
from higgs_tune.preprocess.audio.clip import Clip, Waveform
from higgs_tune.preprocess.audio.containers import container_mismatch
from higgs_tune.preprocess.audio.levels import clip_flags, normalize_loudness
from higgs_tune.preprocess.audio.options import AudioOptions
from higgs_tune.preprocess.audio.resample import resample_soxr
from higgs_tune.preprocess.input.arrow import arrow_audio, arrow_cell
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.writer import file_sha256

MAX_CHANNELS = 2
CUT_TOLERANCE_S = 0.1  # durations in metadata are rounded; a cut may end this much after the file does
UNKNOWN_LENGTH = 1 << 60  # libsndfile states more frames than this for a stream whose end it cannot find
MAX_AMPLITUDE = 100.0  # +40 dB of full scale: only integers stored as floating point are louder


def load_clip(clip: Clip, sample_rate_hz: int, options: AudioOptions) -> Waveform:
    """Read, cut, mix down, level and resample one clip.

    Args:
        sample_rate_hz: of the samples that are returned.

    Raises:
        Reject: missing, unreadable, empty, cut off, not finite, too short or too long, …; names the file.
    """
    source = _source(clip, options)
    with _open_audio(source, clip.source) as file:
        samples_SC, rate = _read(file, clip, options), file.samplerate
    flags = clip_flags(samples_SC, rate)
    for flag in flags:
        if flag in options.reject_flags:
            raise Reject(flag, f"the clip is flagged for {flag}", clip.source)
    mono_S = np.mean(samples_SC.T, axis=0)
    if options.loudness_lufs is not None:
        mono_S = normalize_loudness(mono_S, rate, options.loudness_lufs, clip.source)
    mono_S = resample_soxr(mono_S, rate, sample_rate_hz)
    return Waveform(mono_S, len(samples_SC) / rate, _digest(source, clip.source), flags)


def clip_seconds(clip: Clip, options: AudioOptions) -> float | None:
    """Length in seconds by the file's header; None where the header already tells that the file cannot be used."""
    try:
        return header_seconds(clip, options)
    except Reject:
        return None


def header_seconds(clip: Clip, options: AudioOptions) -> float:
    """Length in seconds by the file's header.

    Raises:
        Reject: the header already tells that the file cannot be used.
    """
    with _open_audio(_source(clip, options), clip.source) as file:
        return _span(file, clip, options)[1] / file.samplerate


def _source(clip: Clip, options: AudioOptions) -> Path | bytes:
    """The file to open, or its bytes where they are stored in the data itself."""
    cell = arrow_cell(clip.path)
    if clip.inline:
        source = _inline_bytes(clip)
    elif cell:
        source = arrow_audio(_resolve_path(cell[0], clip.source, options), *cell[1:], clip.source)
    else:
        source = _resolve_path(clip.path, clip.source, options)
    _reject_truncated(source, clip.source)
    return source


@contextmanager
def _open_audio(source: Path | bytes, name: str) -> Iterator[soundfile.SoundFile]:
    """An open file; libsndfile's errors, on opening and on reading, become rejects."""
    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            yield file
    except (soundfile.SoundFileError, RuntimeError, ValueError, OverflowError, TypeError, OSError) as error:
        raise Reject("unreadable_audio", f"not audio that libsndfile reads: {error}", name) from error


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


def _digest(source: Path | bytes, name: str) -> str:
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


def _reject_truncated(source: Path | bytes, name: str) -> None:
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            mismatch = container_mismatch(file)
    except OSError as error:
        raise Reject("unreadable_audio", f"cannot read {source!r:.200}: {error}", name) from error
    if mismatch:
        raise Reject("truncated_audio", mismatch, name)


def _span(file: soundfile.SoundFile, clip: Clip, options: AudioOptions) -> tuple[int, int]:
    """First sample and number of samples of the part that the clip names, by the file's header."""
    rate, source = file.samplerate, clip.source
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise Reject("too_many_channels", f"expected 1 to {MAX_CHANNELS} channels, got {file.channels}", source)
    if file.frames > UNKNOWN_LENGTH:
        raise Reject("unreadable_audio", "the file does not say how long it is", source)
    start = _samples(clip.offset_s or 0.0, rate)
    wanted = file.frames - start if clip.duration_s is None else _samples(clip.duration_s, rate)
    if start and start >= file.frames:
        offset, length = f"{clip.offset_s!r:.20}", f"{file.frames / rate:.3f}"
        raise Reject("cut_outside_audio", f"offset {offset} s, length {length} s", source)
    if wanted > options.max_seconds * rate:
        raise Reject("too_long", _length(wanted / rate, options), source)
    return start, wanted


def _samples(seconds: float, rate: int) -> int:
    return int(min(seconds, UNKNOWN_LENGTH) * rate)


def _read(file: soundfile.SoundFile, clip: Clip, options: AudioOptions) -> np.ndarray:
    """float32 [S, C] of the part that the clip names."""
    rate, source = file.samplerate, clip.source
    start, wanted = _span(file, clip, options)
    if start:
        file.seek(start)
    samples_SC = file.read(wanted, dtype="float32", always_2d=True)
    missing = (wanted - len(samples_SC)) / rate
    if clip.duration_s is None and missing > 0:
        raise Reject("truncated_audio", f"the header states {wanted} samples, got {len(samples_SC)}", source)
    if missing > CUT_TOLERANCE_S:
        raise Reject("cut_outside_audio", f"the cut ends {missing:.3f} s after the file does", source)
    if not samples_SC.size:
        raise Reject("empty_audio", "no samples", source)
    if not np.isfinite(samples_SC).all():
        raise Reject("non_finite_audio", "samples are NaN or infinite", source)
    peak = max(samples_SC.max(), -samples_SC.min())
    if peak > MAX_AMPLITUDE:
        raise Reject("out_of_range", f"expected samples of -1 to 1, at most {MAX_AMPLITUDE:g}, got {peak:g}", source)
    if len(samples_SC) < options.min_seconds * rate:
        raise Reject("too_short", _length(len(samples_SC) / rate, options), source)
    return samples_SC


def _length(seconds: float, options: AudioOptions) -> str:
    return f"expected {options.min_seconds:g} to {options.max_seconds:g} s, got {seconds:.3f} s"
