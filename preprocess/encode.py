"""Step 2: encode the clips of one unit to codes and, if requested, Whisper features.

In: a unit's number. Out: its committed files. Threads read, resample and take the log-mel of the clips ahead, so that
the codec does not wait for them. Clips are encoded one by one (padding would change every feature) and on one CPU
thread (the number of threads changes the last bits of a sum, and with them a code now and then).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from higgs_tune.preprocess.audio.audio import load_clip
from higgs_tune.preprocess.audio.clip import Clip, Waveform
from higgs_tune.preprocess.audio.whisper import Tower, log_mel, mel_bins_of
from higgs_tune.preprocess.codec.checkpoint import load_codec
from higgs_tune.preprocess.codec.codec import HiggsCodec
from higgs_tune.preprocess.config import Job
from higgs_tune.preprocess.progress import UnitStats
from higgs_tune.preprocess.reject import Reject
from higgs_tune.preprocess.workdir import Encoded, Features, WorkFolder
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.format import FRAME_RATE_HZ
from higgs_tune.shards.memory import keep_memory, limit_shape_caches

MIN_FRAMES = 2  # length of the shortest clip that the codec takes


def encode_unit(job: Job, unit: int) -> UnitStats:
    """Task: encode the clips of one unit and commit them; of a committed unit only the rejected ones again."""
    stats, work = UnitStats(), WorkFolder(job.out)
    clips = work.clips(unit)
    whisper = work.whisper(unit * job.config.clips_per_unit, len(clips))
    earlier = [old if isinstance(old, Encoded) else None for old in work.reopen_unit(unit) or [None] * len(clips)]
    with one_thread(), ThreadPoolExecutor(job.config.decode_threads) as threads:
        with stats.timed("load codec"):
            codec = codec_for(job)
        mel_bins = mel_bins_of(job.tower) if any(whisper) else 0
        pending = [
            old or threads.submit(_read, clip, codec.config.sample_rate_hz, job, mel_bins if with_mel else 0)
            for clip, with_mel, old in zip(clips, whisper, earlier, strict=True)
        ]
        results: list[Encoded | Reject] = []
        for clip, waiting in zip(clips, pending, strict=True):
            if isinstance(waiting, Encoded):
                results.append(waiting)
                stats.clips += 1
                continue
            try:
                with stats.timed("wait for decode"):
                    ready = waiting.result()
                results.append(_encode(clip, ready, codec, job, stats))
            except Reject as reject:
                results.append(reject)
            stats.add_result(results[-1])
        with stats.timed("commit"):
            work.commit_unit(unit, results)
    return stats


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch's sums on one CPU thread; parallel work has its own process or thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Ready:
    """A clip that is ready for the codec, and the seconds that its thread spent on it."""

    wave: Waveform
    mels: tuple[Features, ...]
    decode_s: float
    mel_s: float


def _read(clip: Clip, rate_hz: int, job: Job, mel_bins: int) -> _Ready:
    """In a thread: the clip's samples, and its log-mel where `mel_bins` is not 0."""
    began = time.perf_counter()
    wave = load_for_codec(clip, rate_hz, job)
    decoded = time.perf_counter()
    mels = tuple(log_mel(wave.samples_S, rate_hz, mel_bins)) if mel_bins else ()
    return _Ready(wave, mels, decoded - began, time.perf_counter() - decoded)


def load_for_codec(clip: Clip, rate_hz: int, job: Job) -> Waveform:
    """A clip's samples at the codec's rate.

    Raises:
        Reject: the clip cannot be used, or is too short for the codec.
    """
    wave = load_clip(clip, rate_hz, job.audio)
    expected, got = MIN_FRAMES * rate_hz // FRAME_RATE_HZ, len(wave.samples_S)
    if got < expected:
        raise Reject("too_short", f"expected at least {expected} samples for the codec, got {got}", clip.source)
    return wave


def _encode(clip: Clip, ready: _Ready, codec: HiggsCodec, job: Job, stats: UnitStats) -> Encoded:
    wave, mels = ready.wave, ready.mels
    stats.add_time("decode", ready.decode_s)
    stats.add_time("mel", ready.mel_s)
    with stats.timed("encode"):
        codes_KT = codec.encode(wave.samples_S)
    if job.config.whisper_features == "encoder" and mels:
        with stats.timed("tower"):
            tower = _cached_tower(job.tower, device_of(job))
            mels = tuple(tower(mel) for mel in mels)
    info = {"source": clip.source, "seconds": round(wave.seconds, 6), "sha256": wave.sha256}
    return Encoded(codes_KT, mels, info | ({"flags": wave.flags} if wave.flags else {}))


def device_of(job: Job) -> str:
    """The device on which this process encodes; `cuda` is the GPU that the engine gave to it.

    Raises:
        UserError: PyTorch does not see that GPU.
    """
    device, gpus = job.config.device, torch.cuda.device_count()
    if device.startswith("cuda") and int(device[5:] or 0) >= gpus:
        raise UserError("--device is not there", expected=f"a GPU that PyTorch sees (it sees {gpus})", got=device)
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def codec_for(job: Job) -> HiggsCodec:
    """This process's codec; also sets the precision of this process's GPU."""
    assert job.codec is not None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = job.config.tf32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    return _cached_codec(job.codec, device_of(job), job.config.precision)


@lru_cache(maxsize=1)
def _cached_codec(path: Path, device: str, precision: str) -> HiggsCodec:
    if device == "cpu":
        keep_memory()
        limit_shape_caches()
    codec = load_codec(path, device)
    codec.encoder_precision(getattr(torch, precision))
    return codec


@lru_cache(maxsize=1)
def _cached_tower(path: Path, device: str) -> Tower:
    return Tower(path, device)
