"""From an audio file to the waveform that the codec takes: mono float32 at the codec's rate.

In: a file (or bytes) that libsndfile reads: wav, flac, mp3, ogg, opus. Out: samples, length, hash and flags.
The mix-down and the resampling are librosa's (mean over channels, soxr HQ), as Boson's tokenizer calls it; a
cut takes the samples that `librosa.load(offset=…, duration=…)` takes.
Guarantees: a bad file raises `Reject` and nothing else (tests/test_bad_input.py).

Shapes: S samples, C channels.
"""

from __future__ import annotations

import numpy as np
from higgs_tune.preprocess.audio.clip import Clip, Waveform
from higgs_tune.preprocess.audio.levels import clip_flags, normalize_loudness
from higgs_tune.preprocess.audio.opening import AudioFile, open_audio
from higgs_tune.preprocess.audio.options import AudioOptions
from higgs_tune.preprocess.audio.resample import resample_soxr
from higgs_tune.preprocess.audio.source import clip_source, source_sha256
from higgs_tune.preprocess.reject import Reject

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
    source = clip_source(clip, options)
    with open_audio(source, clip.source) as file:
        samples_SC, rate = _read(file, clip, options), file.samplerate
    mono_S = np.mean(samples_SC.T, axis=0)
    flags = clip_flags(samples_SC, mono_S, rate)
    for flag in flags:
        if flag in options.reject_flags:
            raise Reject(flag, f"the clip is flagged for {flag}", clip.source)
    if options.loudness_lufs is not None:
        mono_S = normalize_loudness(mono_S, rate, options.loudness_lufs, clip.source)
    mono_S = resample_soxr(mono_S, rate, sample_rate_hz)
    return Waveform(mono_S, len(samples_SC) / rate, source_sha256(source, clip.source), flags)


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
    with open_audio(clip_source(clip, options), clip.source) as file:
        return _span(file, clip, options)[1] / file.samplerate


def _span(file: AudioFile, clip: Clip, options: AudioOptions) -> tuple[int, int]:
    """First sample and number of samples of the part that the clip names, by the file's header."""
    rate, source = file.samplerate, clip.source
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise Reject("too_many_channels", f"expected 1 to {MAX_CHANNELS} channels, got {file.channels}", source)
    if file.frames > UNKNOWN_LENGTH:
        raise Reject("unreadable_audio", "the header does not state the length; convert it with ffmpeg", source)
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


def _read(file: AudioFile, clip: Clip, options: AudioOptions) -> np.ndarray:
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
