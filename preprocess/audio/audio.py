"""From an audio file to the waveform that the codec takes: mono float32 at the codec's rate.

In: a file (or bytes) that libsndfile reads: wav, flac, mp3, ogg, opus. Out: samples, and what is known of the source.
The mix-down and the resampling are librosa's (mean over channels, soxr HQ), as Boson's tokenizer calls it; a
cut takes the samples that `librosa.load(offset=…, duration=…)` takes.
Never: an exception other than `Reject` for a bad file; more samples in memory than the longest clip that is allowed.

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
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
from higgs_tune.preprocess.audio.containers import misfit
from higgs_tune.preprocess.audio.options import AudioOptions, Flag
from higgs_tune.preprocess.audio.resample import resample_soxr
from higgs_tune.preprocess.input.arrow import arrow_audio, arrow_cell
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.writer import file_sha256

MAX_CHANNELS = 2
CUT_TOLERANCE_S = 0.1  # durations in metadata are rounded; a cut may end this much after the file does
UNKNOWN_LENGTH = 1 << 60  # libsndfile's frames of a stream whose end it cannot find
LOUDEST = 100.0  # +40 dB of full scale: no recording is there, but integers stored as floating point are


@dataclass(frozen=True)
class Clip:
    """One piece of audio that samples refer to; equal clips are encoded once.

    Attributes:
        source: the path as the data names it; for inline audio `inline:` and its SHA-256.
        path: where to read it; empty for inline audio.
        inline: base64 of the file's bytes, or empty.
        offset_s, duration_s: the part to take, in seconds; None: from the start, to the end.
    """

    source: str
    path: str
    inline: str = ""
    offset_s: float | None = None
    duration_s: float | None = None


@dataclass(frozen=True)
class Waveform:
    """samples_S: float32 [S], mono; seconds: length; sha256: of the source file's bytes; flags: what was noticed."""

    samples_S: np.ndarray
    seconds: float
    sha256: str
    flags: tuple[Flag, ...]


def load_clip(clip: Clip, sample_rate_hz: int, options: AudioOptions) -> Waveform:
    """Read, cut, mix down, level and resample one clip.

    Args:
        sample_rate_hz: of the samples that are returned.

    Raises:
        Reject: missing, unreadable, empty, cut off, not finite, too short or too long, …; names the file.
    """
    source = _source(clip, options)
    with _opened(source, clip.source) as file:
        samples_SC, rate = _read(file, clip, options), file.samplerate
    flags = noticed(samples_SC, rate)
    for flag in flags:
        if flag in options.reject_flags:
            raise Reject(flag, f"the clip is flagged for {flag}", clip.source)
    mono_S = np.mean(samples_SC.T, axis=0)
    if options.loudness_lufs is not None:
        mono_S = _level(mono_S, rate, options.loudness_lufs, clip.source)
    mono_S = resample_soxr(mono_S, rate, sample_rate_hz)
    return Waveform(mono_S, len(samples_SC) / rate, _digest(source, clip.source), flags)


def clip_seconds(clip: Clip, options: AudioOptions) -> float | None:
    """Length by the file's header; None where the file cannot be used, as far as that tells."""
    try:
        with _opened(_source(clip, options), clip.source) as file:
            return _span(file, clip, options)[1] / file.samplerate
    except Reject:
        return None


def _source(clip: Clip, options: AudioOptions) -> Path | bytes:
    """The file to open, or the bytes where there is no file of their own."""
    cell = arrow_cell(clip.path)
    if clip.inline:
        source = _inline_bytes(clip)
    elif cell:
        source = arrow_audio(_allowed(cell[0], clip.source, options), *cell[1:], clip.source)
    else:
        source = _allowed(clip.path, clip.source, options)
    _refuse_cut_off(source, clip.source)
    return source


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[soundfile.SoundFile]:
    """Turns libsndfile's errors, on opening and on reading, into rejects."""
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


def _allowed(path: str, source: str, options: AudioOptions) -> Path:
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
        found = source.stat()
        return _cached_digest(source, found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise Reject("unreadable_audio", f"cannot read {source}: {error}", name) from error


@lru_cache(maxsize=4096)
def _cached_digest(path: Path, _size: int, _mtime_ns: int) -> str:
    """Many cuts of one long recording hash it once."""
    return file_sha256(path)


def _refuse_cut_off(source: Path | bytes, name: str) -> None:
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            found = misfit(file)
    except OSError as error:
        raise Reject("unreadable_audio", f"cannot read {source!r:.200}: {error}", name) from error
    if found:
        raise Reject("truncated_audio", found, name)


def _span(file: soundfile.SoundFile, clip: Clip, options: AudioOptions) -> tuple[int, int]:
    """First sample, and number of samples, of the part that the clip names, as far as the header tells."""
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
    if peak > LOUDEST:
        raise Reject("out_of_range", f"expected samples of -1 to 1, at most {LOUDEST:g}, got {peak:g}", source)
    if len(samples_SC) < options.min_seconds * rate:
        raise Reject("too_short", _length(len(samples_SC) / rate, options), source)
    return samples_SC


def _length(seconds: float, options: AudioOptions) -> str:
    return f"expected {options.min_seconds:g} to {options.max_seconds:g} s, got {seconds:.3f} s"


def quiet_share(samples_SC: np.ndarray, rate: int, *, below_dbfs: float) -> float:
    """Share of a clip's 20 ms windows whose level is below `below_dbfs`, relative to full scale."""
    window = max(1, rate // 50)
    whole = samples_SC[: max(len(samples_SC) // window, 1) * window]
    windows = whole.reshape(-1, min(window, len(whole)) * samples_SC.shape[1])
    return float(np.mean(np.mean(np.square(windows), axis=1) < 10 ** (below_dbfs / 10)))


def noticed(samples_SC: np.ndarray, rate: int) -> tuple[Flag, ...]:
    """What is wrong with how a clip was recorded.

    silence: 90 % of its 20 ms windows are below -60 dBFS. clipping: three samples in a row at full scale.
    """
    flags: list[Flag] = []
    if quiet_share(samples_SC, rate, below_dbfs=-60.0) >= 0.9:
        flags.append("silence")
    full = np.abs(samples_SC) >= 0.999
    if (full[2:] & full[1:-1] & full[:-2]).any():
        flags.append("clipping")
    return tuple(flags)


def _level(mono_S: np.ndarray, rate: int, target_lufs: float, source: str) -> np.ndarray:
    """Boson's `loudness_normalize`: BS.1770 gain on the mono mix, before resampling."""
    import pyloudnorm  # brings scipy's signal package, which takes a second

    try:
        measured = pyloudnorm.Meter(rate).integrated_loudness(mono_S)
    except ValueError as error:
        raise Reject("unmeasurable_loudness", f"{error}", source) from error
    if not np.isfinite(measured):
        raise Reject("unmeasurable_loudness", "silent", source)
    gain = 10.0 ** ((target_lufs - measured) / 20.0)
    return (mono_S * gain).astype(np.float32)
