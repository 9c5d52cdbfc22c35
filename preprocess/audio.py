"""From an audio file to the waveform that the codec takes: mono float32 at the codec's rate.

In: a file (or bytes) that libsndfile reads: wav, flac, mp3, ogg/opus. Out: samples, and what is known of the source.
The mix-down and the resampling are librosa's (mean over channels, soxr HQ), the calls that Boson's tokenizer makes.
Never: an exception other than `Reject` for a bad file.

Shapes: S samples, C channels.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path

import librosa
import numpy as np
import soundfile

from .reject import Reject


@dataclass(frozen=True)
class Clip:
    """One piece of audio that samples refer to; equal clips are encoded once.

    Attributes:
        source: the path or URL as the data names it; for inline audio `inline:` and its SHA-256.
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
class Limits:
    """Which clips are taken, in seconds."""

    min_seconds: float
    max_seconds: float


@dataclass(frozen=True)
class Waveform:
    """samples_S: float32 [S], mono; seconds: length; sha256: of the source file's bytes."""

    samples_S: np.ndarray
    seconds: float
    sha256: str


def load_clip(clip: Clip, sample_rate_hz: int, limits: Limits) -> Waveform:
    """Read, cut, mix down and resample one clip.

    Raises:
        Reject: missing, unreadable, empty, not finite, too short or too long; names the file.
    """
    data = _read(clip)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = file.samplerate
            if clip.duration_s is None and clip.offset_s is None and file.frames > limits.max_seconds * rate:
                raise Reject("too_long", _length(file.frames / rate, limits), clip.source)
            start = round((clip.offset_s or 0.0) * rate)
            if start:
                file.seek(min(start, file.frames))
            frames = -1 if clip.duration_s is None else round(clip.duration_s * rate)
            samples_SC = file.read(frames, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, ValueError, OverflowError, TypeError) as error:
        raise Reject("unreadable_audio", f"not audio that libsndfile reads: {error}", clip.source) from error
    _check(samples_SC, rate, limits, clip.source)
    mono_S = np.mean(samples_SC.T, axis=0)
    if rate != sample_rate_hz:
        mono_S = librosa.resample(mono_S, orig_sr=rate, target_sr=sample_rate_hz)
    return Waveform(mono_S, len(samples_SC) / rate, hashlib.sha256(data).hexdigest())


def _read(clip: Clip) -> bytes:
    if clip.inline:
        try:
            return base64.b64decode(clip.inline, validate=True)
        except (binascii.Error, ValueError) as error:
            raise Reject("unreadable_audio", f"raw_audio is not base64: {error}", clip.source) from error
    try:
        return Path(clip.path).read_bytes()
    except FileNotFoundError:
        raise Reject("missing_audio", f"no such file: {clip.path}", clip.source) from None
    except (OSError, ValueError) as error:
        raise Reject("unreadable_audio", f"cannot read {clip.path}: {error}", clip.source) from error


def _check(samples_SC: np.ndarray, rate: int, limits: Limits, source: str) -> None:
    seconds = len(samples_SC) / rate
    if not samples_SC.size:
        raise Reject("empty_audio", "no samples", source)
    if not np.isfinite(samples_SC).all():
        raise Reject("non_finite_audio", "samples are NaN or infinite", source)
    if seconds > limits.max_seconds or math.isnan(seconds):
        raise Reject("too_long", _length(seconds, limits), source)
    if seconds < limits.min_seconds:
        raise Reject("too_short", _length(seconds, limits), source)


def _length(seconds: float, limits: Limits) -> str:
    return f"expected {limits.min_seconds:g} to {limits.max_seconds:g} s, got {seconds:.3f} s"
