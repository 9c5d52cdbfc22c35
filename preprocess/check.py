"""higgs-preprocess --check: read everything, encode nothing, and say whether the data is fit to build.

In: the data and the model; the codec, if given, is timed. Out: a report as plain values (check_report prints it).
It runs the steps of a build with two changes: clips are decoded but get zeros for codes, and samples are made but not
written.
Guarantees: it rejects the samples that a build rejects, and leaves no file behind (tests/test_check.py).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.preprocess.assemble import make_sample, set_writer
from higgs_tune.preprocess.audio.audio import clip_seconds
from higgs_tune.preprocess.audio.clip import Clip
from higgs_tune.preprocess.audio.resample import resampled_length
from higgs_tune.preprocess.audio.whisper import HOP, RATE_HZ, channels_of
from higgs_tune.preprocess.check_stats import (
    dominant_script,
    findings_table,
    language_table,
    percentiles,
    rate_outliers,
)
from higgs_tune.preprocess.codec.checkpoint import CODEC_RATE_HZ
from higgs_tune.preprocess.config import Job, PreprocessConfig
from higgs_tune.preprocess.encode import codec_for, load_for_codec, one_thread
from higgs_tune.preprocess.engine import Stop, auto_processes, run_tasks
from higgs_tune.preprocess.listing import list_work
from higgs_tune.preprocess.pipeline import audio_advice, make_job
from higgs_tune.preprocess.progress import ProgressBar, UnitStats
from higgs_tune.preprocess.reject import Reject
from higgs_tune.preprocess.text_tokens import cached_tokenizer, count_tokens
from higgs_tune.preprocess.workdir import Encoded, Features, WorkFolder
from higgs_tune.shards.format import FRAME_RATE_HZ, Sample, encode_sample
from higgs_tune.shards.layout import LAYOUTS, layout_of
from higgs_tune.shards.sequence import mel_positions, packed_length
from higgs_tune.shards.split import VAL, named_side, split_sides
from transformers import PreTrainedTokenizerBase

DURATION_BINS_S = (0, 1, 2, 3, 5, 10, 15, 20, 30, 60)
TOKEN_BINS = (0, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
MEL_COMPRESSION = 0.8  # zstandard on float16 log-mel of speech
CORRUPT = ("unreadable_audio", "truncated_audio", "joined_audio", "non_finite_audio", "empty_audio")
PAIR = 2  # a speaker with fewer clips has no reference
FEW_CLIPS = 5  # a speaker with fewer clips has little choice of references
TIMED_S = 4.0
SHOWN = 20
CUT_SHORT_S = 0.1  # durations in lists are rounded


@dataclass
class SampleFacts:
    """Figures of one sample.

    Attributes:
        reject: its line for rejects.jsonl; None where it is usable.
        texts: (language, characters, tokens) of each text.
        rates: (language, characters a second) of each spoken text.
        self_reference: a reference has the target's content.
        spoken: texts of its messages, but for the system's.
        layout: its prompt layout.
        side: of the validation split, as it names it.
    """

    reject: dict[str, Any] | None
    key: str = ""
    speaker: str = ""
    tokens: int = 0
    stored_bytes: int = 0
    segments: list[dict[str, Any]] = field(default_factory=list)
    texts: list[tuple[str, int, int]] = field(default_factory=list)
    rates: list[tuple[str, float]] = field(default_factory=list)
    self_reference: bool = False
    spoken: list[str] = field(default_factory=list)
    layout: str = "other"
    side: str | None = None


def check_data(config: PreprocessConfig) -> dict[str, Any]:
    """Check the data and report on it.

    Raises:
        UserError: bad paths or checkpoints, or data of unknown form.
    """
    with tempfile.TemporaryDirectory(prefix="higgs-check-") as folder, Stop() as stop, ProgressBar() as progress:
        job = replace(make_job(config), out=Path(folder))
        work = WorkFolder(job.out)
        work.folder.mkdir()
        listing = list_work(job, work, stop.check)
        progress.start("read", listing["clips"], "clips")
        for stats in run_tasks(partial(measure_unit, job), list(range(listing["units"])), config, stop):
            progress.add_unit(stats)
        progress.start("measure", listing["shards"], "shards")
        shards: dict[int, list[SampleFacts]] = {}
        for number, facts in run_tasks(partial(measure_shard, job), list(range(listing["shards"])), config, stop):
            shards[number] = facts
            progress.advance(1)
        clips = [clip for unit in range(listing["units"]) for clip in work.encoded(unit)]
        return make_report(clips, [facts for number in sorted(shards) for facts in shards[number]], job)


def measure_unit(job: Job, unit: int) -> UnitStats:
    """Task: decode the clips of a unit; store their facts and zeros for codes."""
    work, stats = WorkFolder(job.out), UnitStats()
    clips = work.clips(unit)
    whisper = work.whisper(unit * job.config.clips_per_unit, len(clips))
    results = [_measure(clip, job, whisper=bool(wanted)) for clip, wanted in zip(clips, whisper, strict=True)]
    for result in results:
        stats.add_result(result)
    work.commit_unit(unit, results)
    return stats


def _measure(clip: Clip, job: Job, *, whisper: bool) -> Encoded | Reject:
    try:
        wave = load_for_codec(clip, CODEC_RATE_HZ, job)
    except Reject as reject:
        return reject
    codebooks = set_writer(job).ids.codebooks
    codes_KT = np.zeros((codebooks, max(1, round(wave.seconds * FRAME_RATE_HZ))), np.uint16)
    features = []
    if whisper:
        samples = resampled_length(len(wave.samples_S), CODEC_RATE_HZ, RATE_HZ)
        channels = channels_of(job.tower, job.config.whisper_features)
        for at in range(0, samples, 30 * RATE_HZ):
            frames = -(-min(samples - at, 30 * RATE_HZ) // HOP)
            frames = frames if job.config.whisper_features == "mel" else frames // 4
            features.append(Features(np.zeros((channels, frames), np.float16), frames))
    info = {"source": clip.source, "seconds": round(wave.seconds, 6), "sha256": wave.sha256}
    info |= {"cut_short": True} if _is_cut_short(clip, wave.seconds, job) else {}
    return Encoded(codes_KT, tuple(features), info | ({"flags": wave.flags} if wave.flags else {}))


def _is_cut_short(clip: Clip, seconds: float, job: Job) -> bool:
    """Whether a clip has a duration, no offset, and a longer file: lists often give a duration as a mere fact."""
    if clip.duration_s is None or clip.offset_s:
        return False
    whole = clip_seconds(replace(clip, duration_s=None), replace(job.audio, max_seconds=math.inf))
    return whole is not None and whole - seconds > CUT_SHORT_S


def measure_shard(job: Job, number: int) -> tuple[int, list[SampleFacts]]:
    """Task: the facts of one shard's samples, in order."""
    work, writer = WorkFolder(job.out), set_writer(job)
    tokenizer, facts = cached_tokenizer(job.model, writer.ids), []
    for line in work.read_lines("samples", number):
        try:
            sample = make_sample(line, job, work, tokenizer, writer.ids)
        except Reject as reject:
            facts.append(SampleFacts(reject.as_line(line["key"], line["position"])))
        else:
            per_unit = job.config.clips_per_unit
            clips = [work.encoded(clip // per_unit)[clip % per_unit] for clip in line["clips"]]
            infos = [clip.info for clip in clips if isinstance(clip, Encoded)]
            facts.append(_facts(sample, infos, job, tokenizer, writer.ids.codebooks))
    return number, facts


def _facts(
    sample: Sample, infos: list[dict[str, Any]], job: Job, tokenizer: PreTrainedTokenizerBase, codebooks: int
) -> SampleFacts:
    """The figures of a sample; `infos`: of its clips, in order of appearance."""
    meta, texts, rates, clips = sample.meta, [], [], iter(infos)
    pieces: dict[bool, set[tuple[str, float, float]]] = {True: set(), False: set()}  # of targets, of references
    for message in meta["messages"]:
        spoken = [part["text"] for part in message["content"] if part["type"] == "text"]
        target = message["role"] == "assistant"
        heard = 0.0
        for part in message["content"]:
            if part["type"] == "audio":
                info = next(clips)
                heard += info["seconds"]
                pieces[target].add((info["sha256"], part.get("offset") or 0.0, info["seconds"]))
        given = (meta["misc"] or {}).get("language")
        language = given if isinstance(given, str) else dominant_script(" ".join(spoken))
        texts += [(language, len(text), count_tokens(text, tokenizer)) for text in spoken]
        if target and spoken and heard:
            rates.append((language, sum(map(len, spoken)) / heard))
    mels = sum(mel.nbytes for mel in sample.mels)
    tokens = packed_length(sample.tokens_2L.shape[1], sample.segment_frames, codebooks)
    return SampleFacts(
        None,
        sample.key,
        meta["speaker"] or "",
        tokens + sum(mel_positions(sample, job.config.whisper_features)),
        len(encode_sample(sample)) + int(mels * MEL_COMPRESSION),
        meta["segments"],
        texts,
        rates,
        bool(pieces[True] & pieces[False]),
        [
            part["text"]
            for message in meta["messages"]
            for part in message["content"]
            if part["type"] == "text" and message["role"] != "system"
        ],
        layout_of(meta["messages"]),
        named_side(meta["misc"]),
    )


def make_report(clips: list[Encoded | Reject], facts: list[SampleFacts], job: Job) -> dict[str, Any]:
    """The report as plain values, from all clips and samples."""
    good = [sample for sample in facts if sample.reject is None]
    rejects = [sample.reject for sample in facts if sample.reject is not None]
    itself = [sample.key for sample in good if sample.self_reference]
    measured = [clip.info for clip in clips if isinstance(clip, Encoded)]
    bad = {(clip.reason, clip.file) for clip in clips if isinstance(clip, Reject)}
    bad |= {(reject["reason"], reject["file"]) for reject in rejects if reject["file"]}
    share = (len(rejects) + len(itself)) / max(len(facts), 1)
    flags = Counter(flag for info in measured for flag in info.get("flags", ()))
    seconds, tokens = [info["seconds"] for info in measured], [sample.tokens for sample in good]
    return {
        "fit_to_build": bool(good) and share <= job.config.max_reject_share,
        "bad_share": share,
        "samples": {
            "all": len(facts),
            "usable": len(good),
            "rejected": len(rejects),
        },
        "samples_with_audio_target": sum(any(s["role"] == "assistant" for s in sample.segments) for sample in good),
        "prompt_layouts": {name: sum(sample.layout == name for sample in good) for name in LAYOUTS},
        "rejects": dict(Counter(reject["reason"] for reject in rejects)),
        "reject_examples": rejects[:SHOWN],
        "hours": {
            "distinct_clips": sum(seconds) / 3600,
            "in_samples": sum(s["seconds"] for sample in good for s in sample.segments) / 3600,
        },
        "clips": {"distinct": len(clips), "flags": dict(flags)},
        "seconds": percentiles(seconds) | {"histogram": _histogram(seconds, DURATION_BINS_S)},
        "tokens": percentiles(tokens) | {"histogram": _histogram(tokens, TOKEN_BINS)},
        "text_tokens": percentiles([count for sample in good for _, _, count in sample.texts]),
        "files": {
            "missing": sorted(file for reason, file in bad if reason == "missing_audio"),
            "corrupt": sorted(file for reason, file in bad if reason in CORRUPT),
            "duplicate": _duplicates(measured),
        },
        "self_references": itself,
        "empty_texts": sum(reject["reason"] == "empty_text" for reject in rejects),
        "rate_outliers": rate_outliers([(s.key, language, rate) for s in good for language, rate in s.rates]),
        "languages": language_table(text for sample in good for text in sample.texts),
        "samples_without_speaker": sum(not sample.speaker for sample in good),
        "cut_short": sorted({info["source"] for info in measured if info.get("cut_short")}),
        "text_findings": findings_table((sample.key, sample.spoken) for sample in good),
        "advice": audio_advice(rejects, job),
        "speakers": _speakers(good),
        "val_fraction": job.config.val_fraction,
        "sides": _sides(good, job),
        "predicted": _predicted(good, sum(seconds), len(clips), job),
    }


def _histogram(values: list[float] | list[int], bins: tuple[int, ...]) -> dict[str, int]:
    """Counts by lower edge."""
    at = np.searchsorted(bins, values, side="right") - 1
    return {str(edge): int((at == i).sum()) for i, edge in enumerate(bins)}


def _duplicates(measured: list[dict[str, Any]]) -> list[list[str]]:
    """Groups of files with the same content."""
    groups: dict[str, set[str]] = {}
    for info in measured:
        groups.setdefault(info["sha256"], set()).add(info["source"])
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _speakers(good: list[SampleFacts]) -> dict[str, Any]:
    clips: dict[str, set[str]] = {}
    for sample in good:
        targets = {s["sha256"] for s in sample.segments if s["role"] == "assistant"}
        if sample.speaker:
            clips.setdefault(sample.speaker, set()).update(targets)
    counts = {name: len(digests) for name, digests in sorted(clips.items())}
    return {
        "count": len(counts),
        "single_clip": [name for name, count in counts.items() if count < PAIR],
        "few_clips": {name: count for name, count in counts.items() if count < FEW_CLIPS},
    }


def _sides(good: list[SampleFacts], job: Job) -> dict[str, int]:
    """The sides of the validation split that a build makes."""
    speakers = [sample.speaker for sample in good]
    if job.config.val_by == "split":
        return split_sides(np.array([sample.side == VAL for sample in good], np.bool_), speakers)
    by_speaker = job.config.val_by == "speaker"
    names = [sample.speaker or str(None) if by_speaker else sample.key for sample in good]
    distinct = sorted(set(names))
    held_out = dict(zip(distinct, set_writer(job).split.held_out(distinct).tolist(), strict=True))
    return split_sides(np.array([held_out[name] for name in names], np.bool_), speakers)


def _predicted(good: list[SampleFacts], distinct_s: float, clips: int, job: Job) -> dict[str, Any]:
    """Disk of the set, and time to encode it, from the codec's speed on noise."""
    disk = sum(sample.stored_bytes for sample in good)
    if job.codec is None:
        return {"disk_bytes": disk, "encode_seconds": None, "times_real_time": None, "processes": None}
    codec, device = codec_for(job), job.config.device
    noise_S = 0.1 * np.random.default_rng(0).standard_normal(int(TIMED_S * codec.config.sample_rate_hz))
    with one_thread():
        codec.encode(noise_S)  # warm-up
        began = time.perf_counter()
        codec.encode(noise_S)
    speed = TIMED_S / (time.perf_counter() - began)
    units = -(-clips // job.config.clips_per_unit)
    processes = min(job.config.num_processes or auto_processes(device, units), max(units, 1))
    encode_s = distinct_s / (speed * processes)
    return {"disk_bytes": disk, "encode_seconds": encode_s, "times_real_time": speed, "processes": processes}
