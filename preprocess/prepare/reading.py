"""Reads a recording of any length in blocks: mono float32 at 16 kHz, in memory that does not grow with the length.

libsndfile reads what higgs-preprocess reads. Other containers (m4a, aac, webm, mp4) are decoded once by ffmpeg, where
it is installed, to a FLAC file in `DIR/audio/`, which then takes the recording's place; originals are never changed.

Shapes: S samples, C channels.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from higgs_tune.preprocess.audio.audio import MAX_AMPLITUDE, MAX_CHANNELS, UNKNOWN_LENGTH, load_clip
from higgs_tune.preprocess.audio.clip import Clip
from higgs_tune.preprocess.audio.opening import open_audio
from higgs_tune.preprocess.audio.options import AudioOptions
from higgs_tune.preprocess.filetype import HEAD_BYTES, file_kind
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards import durable

RATE_HZ = 16_000
BLOCK_S = 20
AUDIO = "audio"
FFMPEG = "ffmpeg"
_ADDRESS = re.compile(r" @ 0x[0-9a-f]+")  # in ffmpeg's messages; they differ from run to run
_DURATION = re.compile(r"Duration: (\d+):(\d+):([\d.]+)")
_ANY_LENGTH = AudioOptions(min_seconds=0.0, max_seconds=1e9)


@dataclass(frozen=True)
class Block:
    """samples_SC: as in the file, float32. mono_S: the mix at 16 kHz; the blocks' join is the whole recording's."""

    samples_SC: np.ndarray
    mono_S: np.ndarray


@dataclass(frozen=True)
class Form:
    """A recording's own rate in Hz, channels, and length in samples by its header."""

    rate: int
    channels: int
    frames: int


def read_form(path: Path) -> Form:
    """What the header says.

    Raises:
        Reject: no audio, damaged, or more than two channels.
    """
    with open_audio(path, str(path)) as file:
        if not 1 <= file.channels <= MAX_CHANNELS:
            raise Reject("too_many_channels", f"expected 1 to {MAX_CHANNELS} channels, got {file.channels}", str(path))
        if file.frames > UNKNOWN_LENGTH:
            raise Reject("unreadable_audio", "the header does not state the length; convert it with ffmpeg", str(path))
        if not file.frames:
            raise Reject("empty_audio", "no samples", str(path))
        return Form(file.samplerate, file.channels, file.frames)


def read_blocks(path: Path, form: Form) -> Iterator[Block]:
    """The recording from its first to its last sample.

    Raises:
        Reject: it ends before its header says, or holds samples that are not finite or far out of range.
    """
    import soxr

    name, left = str(path), form.frames
    stream = soxr.ResampleStream(form.rate, RATE_HZ, 1, dtype="float32", quality="HQ") if form.rate != RATE_HZ else None
    with open_audio(path, name) as file:
        while left:
            samples_SC = file.read(min(left, BLOCK_S * form.rate), dtype="float32", always_2d=True)
            left -= len(samples_SC)
            if not len(samples_SC):
                got = form.frames - left
                raise Reject("truncated_audio", f"the header states {form.frames} samples, got {got}", name)
            if not np.isfinite(samples_SC).all():
                raise Reject("non_finite_audio", "samples are NaN or infinite", name)
            if np.abs(samples_SC).max() > MAX_AMPLITUDE:
                raise Reject("out_of_range", f"expected samples of -1 to 1, at most {MAX_AMPLITUDE:g}", name)
            mono_S = samples_SC.mean(axis=1) if form.channels > 1 else samples_SC[:, 0]
            yield Block(samples_SC, stream.resample_chunk(mono_S, last=not left) if stream else mono_S)


def read_cut(path: Path, start_ms: int, end_ms: int) -> np.ndarray:
    """float32 [S] at 16 kHz: the cut as higgs-preprocess will read it."""
    clip = Clip(str(path), str(path), "", start_ms / 1000, (end_ms - start_ms) / 1000)
    return load_clip(clip, RATE_HZ, _ANY_LENGTH).samples_S


def converted_file(out: Path, sha256: str) -> Path:
    """Where the conversion of a recording lies, if it needs one."""
    return out / AUDIO / f"{sha256[:16]}.flac"


def usable_file(path: Path, out: Path, sha256: str) -> Path:
    """The file to read: the recording's own, or its conversion by ffmpeg.

    Raises:
        Reject: neither libsndfile nor ffmpeg reads it, or ffmpeg would and is not installed.
    """
    converted = converted_file(out, sha256)
    if converted.is_file():
        return converted
    try:
        read_form(path)
        return path
    except Reject as reject:
        if reject.reason != "unreadable_audio" or not _may_be_media(path):
            raise
        if shutil.which(FFMPEG) is None:
            raise Reject(reject.reason, f"{reject.detail}; or install ffmpeg", reject.file) from reject
    _convert(path, converted)
    return converted


def _may_be_media(path: Path) -> bool:
    with path.open("rb") as file:
        kind = file_kind(file.read(HEAD_BYTES))
    return FFMPEG in kind


def _convert(path: Path, converted: Path) -> None:
    """Decode the first audio stream to FLAC, at its own rate, mixed to mono; a decoding error fails."""
    converted.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=converted.parent, prefix=durable.TEMP_PREFIX) as folder:
        made = Path(folder) / "audio.flac"
        command = [FFMPEG, "-nostdin", "-hide_banner", "-nostats", "-xerror", "-i", f"file:{path.absolute()}"]
        command += ["-map", "0:a:0", "-vn", "-sn", "-ac", "1", "-map_metadata", "-1"]
        command += ["-fflags", "+bitexact", "-flags", "+bitexact", str(made)]
        done = subprocess.run(command, capture_output=True, check=False)
        said = _ADDRESS.sub("", done.stderr.decode("utf-8", "replace")).strip().splitlines() or ["no message"]
        if done.returncode or not made.is_file():
            missing = any("matches no streams" in line for line in said)
            detail = "a video without audio" if missing else f"ffmpeg cannot decode it: {_error(said):.200}"
            raise Reject("no_audio_stream" if missing else "unreadable_audio", detail, str(path))
        _refuse_shorter(made, "\n".join(said), str(path))
        durable.fsync_file(made)
        made.replace(converted)
        durable.fsync_folder(converted.parent)


def _error(said: list[str]) -> str:
    """The last line that names an error, or the last."""
    return next((line for line in reversed(said) if re.search("error|invalid", line, re.IGNORECASE)), said[-1])


def _refuse_shorter(made: Path, said: str, name: str) -> None:
    """Refuse a recording of which ffmpeg decoded less than the container's header states."""
    form, stated = read_form(made), _DURATION.search(said)
    if stated:
        seconds = int(stated[1]) * 3600 + int(stated[2]) * 60 + float(stated[3])
        if form.frames / form.rate < seconds - max(1.0, 0.02 * seconds):
            detail = f"the header states {seconds:.1f} s, ffmpeg decodes {form.frames / form.rate:.1f} s"
            raise Reject("truncated_audio", detail, name)
