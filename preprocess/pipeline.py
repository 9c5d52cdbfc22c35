"""The main path of higgs-preprocess: list, encode, assemble, finish.

In: a ChatML file and two checkpoints. Out: a finished shard set (shards/format.py) and a summary.

1. list      read and check every entry; number the distinct clips; write what each shard and each unit holds
2. encode    each unit of clips becomes codes, on `num_processes` codecs
3. assemble  each shard's samples get tokens, labels and codes, and become one tar file
4. finish    index, rejects, and last the manifest

Never: an audio clip encoded twice; a sample lost without a line in rejects.jsonl; a result that depends on the number
of processes or on where a run was killed. Steps 2 and 3 are tasks that know only a number, so any engine can run them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..shards import durable
from ..shards.errors import UserError
from ..shards.format import Sample
from ..shards.sequence import SpecialIds
from ..shards.writer import REJECTS, Committed, SetWriter, ValidationSplit, count_reasons, file_sha256
from .audio import Clip, Limits, load_clip
from .chatml import key_of, parse_entry, read_entries, stored_messages, tokenize
from .checkpoint import describe_checkpoint, load_tokenizer, read_config, special_ids
from .codec import HiggsCodec
from .codec_checkpoint import load_codec, weights_sha256
from .config import PreprocessConfig
from .progress import Progress
from .reject import Reject
from .work import Encoded, Work, batches


def build(config: PreprocessConfig) -> dict[str, Any]:
    """Build a shard set, or continue one.

    Returns:
        `samples`, `seconds`, `clips`, `rejects` (a dict by reason), `already_built`.

    Raises:
        UserError: bad paths, checkpoints or options; or no sample is left.
    """
    provenance = make_provenance(config)
    work, writer = Work(config.out), set_writer(config)
    if work.finished(provenance["request"]):
        return {"already_built": True}
    writer.begin()
    work.begin(provenance["request"])
    with Progress() as progress:
        listing = work.listing or list_work(config, work)
        _encode_all(config, work, listing, progress)
        shards = _assemble_all(config, writer, listing, progress)
    rejects = [reject for shard in shards for reject in shard.rejects]
    if not any(len(shard.rows) for shard in shards):
        durable.write_bytes(config.out / REJECTS, b"".join(durable.to_json(reject) + b"\n" for reject in rejects))
        raise UserError("no sample is left", where=config.data, got=f"rejects by reason: {count_reasons(rejects)}")
    totals = writer.finish(listing["shards"], provenance)["totals"]
    return {
        "already_built": False,
        "samples": totals["samples"],
        "seconds": totals["seconds"],
        "clips": listing["clips"],
        "encoded_seconds": progress.encoded_seconds,
        "rejects": count_reasons(rejects),
    }


def make_provenance(config: PreprocessConfig) -> dict[str, Any]:
    """What made the set: data, model, codec, options. `paths` only help the inspector; nothing checks them."""
    if not config.data.is_file():
        raise UserError("no data file here", where=config.data)
    model = describe_checkpoint(config.model_path)
    codec = {"name": config.audio_tokenizer_path.resolve().name}
    if not (config.audio_tokenizer_path / "config.json").is_file():
        raise UserError("no audio tokenizer here", where=config.audio_tokenizer_path, expected="config.json")
    codec["weights_sha256"] = weights_sha256(config.audio_tokenizer_path)
    machine_only = {"data", "out", "model_path", "audio_tokenizer_path", "num_processes", "device", "debug"}
    options = {k: v for k, v in asdict(config).items() if k not in machine_only}
    request = {"data_sha256": file_sha256(config.data), "model": model, "codec": codec, "options": options}
    paths = {"model": str(config.model_path.absolute()), "codec": str(config.audio_tokenizer_path.absolute())}
    return {"model": model, "codec": codec, "features": {"whisper": "none"}, "request": request, "paths": paths}


# 1. list


def list_work(config: PreprocessConfig, work: Work) -> dict[str, int]:
    """Check every entry, number the distinct clips, and write the tasks.

    A line of samples-*.jsonl: `key`, `entry` and the numbers of its `clips`; or `key` and `reject`.
    """
    numbers: dict[bytes, int] = {}
    keys: set[bytes] = set()
    new_clips: list[Clip] = []
    units = samples = shards = 0

    def number(clip: Clip) -> int:
        name = hashlib.blake2b(repr(clip).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if name not in numbers:
            numbers[name] = len(numbers)
            new_clips.append(clip)
        return numbers[name]

    for batch in batches(enumerate(read_entries(config.data)), config.samples_per_shard):
        work.write_lines("samples", shards, [_line(entry, at, config, keys, number) for at, entry in batch])
        samples, shards = samples + len(batch), shards + 1
        while len(new_clips) >= config.clips_per_unit:
            work.write_lines("clips", units, [asdict(clip) for clip in new_clips[: config.clips_per_unit]])
            del new_clips[: config.clips_per_unit]
            units += 1
    if new_clips:
        work.write_lines("clips", units, [asdict(clip) for clip in new_clips])
        units += 1
    listing = {"samples": samples, "shards": shards, "clips": len(numbers), "units": units}
    work.commit_listing(listing)
    return listing


def _line(
    entry: Any, position: int, config: PreprocessConfig, keys: set[bytes], number: Callable[[Clip], int]
) -> dict[str, Any]:
    key = key_of(entry, position)
    try:
        sample = parse_entry(entry, position, config.data.parent)
        name = hashlib.blake2b(key.encode(), digest_size=16).digest()
        if name in keys:
            raise Reject("duplicate_id", f"another sample is named {key}")
        keys.add(name)
        return {"key": key, "position": position, "entry": entry, "clips": [number(clip) for clip in sample.clips]}
    except Reject as reject:
        return {"key": key, "position": position, "reject": [reject.reason, reject.detail, reject.file]}


# 2. encode


def _encode_all(config: PreprocessConfig, work: Work, listing: dict[str, int], progress: Progress) -> None:
    progress.start("encode", listing["clips"], "clips")
    waiting = []
    for unit in range(listing["units"]):
        done = work.unit_info(unit)
        if done is None:
            waiting.append(unit)
        else:
            progress.skip(len(done))
    for info in run_tasks(partial(encode_unit, config), waiting, config.num_processes):
        progress.encoded(info)


def encode_unit(config: PreprocessConfig, unit: int) -> list[dict[str, Any]]:
    """Task: encode the clips of one unit and commit their codes.

    Returns:
        One dict a clip: `frames`, `seconds`, `sha256`, or `reject`.
    """
    work = Work(config.out)
    codec = codec_for(config)
    limits = Limits(config.min_seconds, config.max_seconds)
    work.commit_unit(unit, [_encode_clip(clip, codec, limits) for clip in work.clips(unit)])
    info = work.unit_info(unit)
    assert info is not None
    return info


def _encode_clip(clip: Clip, codec: HiggsCodec, limits: Limits) -> Encoded | Reject:
    try:
        wave = load_clip(clip, codec.config.sample_rate_hz, limits)
        if len(wave.samples_S) < codec.shortest_clip():
            raise Reject("too_short", f"{len(wave.samples_S)} samples are less than one frame", clip.source)
        return codec.encode(wave.samples_S), {"seconds": round(wave.seconds, 6), "sha256": wave.sha256}
    except Reject as reject:
        return reject


def codec_for(config: PreprocessConfig) -> HiggsCodec:
    """This process's codec."""
    device = config.device
    if device == "auto":
        device = f"cuda:{os.getpid() % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    return _cached_codec(config.audio_tokenizer_path, device)


@lru_cache(maxsize=1)
def _cached_codec(path: Path, device: str) -> HiggsCodec:
    return load_codec(path, device)


# 3. assemble


def set_writer(config: PreprocessConfig) -> SetWriter:
    """The writer of the set that is asked for."""
    ids = special_ids(read_config(config.model_path), config.model_path)
    return SetWriter(config.out, ids, ValidationSplit(config.val_fraction, config.val_by))


def _assemble_all(
    config: PreprocessConfig, writer: SetWriter, listing: dict[str, int], progress: Progress
) -> list[Committed]:
    progress.start("assemble", listing["shards"], "shards")
    waiting = [number for number in range(listing["shards"]) if writer.committed(number) is None]
    progress.skip(listing["shards"] - len(waiting))
    for _ in run_tasks(partial(assemble_shard, config), waiting, config.num_processes):
        progress.advance(1)
    shards = [writer.committed(number) for number in range(listing["shards"])]
    return [shard for shard in shards if shard is not None]


def assemble_shard(config: PreprocessConfig, number: int) -> None:
    """Task: turn one shard's samples into a tar file and commit what it adds to the index."""
    work, writer = Work(config.out), set_writer(config)
    tokenizer = _cached_tokenizer(config.model_path, writer.ids)
    rejects: list[dict[str, Any]] = []

    def samples() -> Iterator[Sample]:
        for line in work.read_lines("samples", number):
            try:
                yield make_sample(line, config, work, tokenizer, writer.ids)
            except Reject as reject:
                found = {"reason": reject.reason, "detail": reject.detail, "file": reject.file}
                rejects.append({"id": line["key"], "position": line["position"], **found})

    writer.write(number, samples(), rejects)


@lru_cache(maxsize=1)
def _cached_tokenizer(path: Path, ids: SpecialIds) -> PreTrainedTokenizerBase:
    return load_tokenizer(path, ids)


def make_sample(
    line: dict[str, Any], config: PreprocessConfig, work: Work, tokenizer: PreTrainedTokenizerBase, ids: SpecialIds
) -> Sample:
    """One line of samples-*.jsonl as a stored sample.

    Raises:
        Reject: the line says so, one of its clips was rejected, or its text cannot be used.
    """
    if "reject" in line:
        raise Reject(*line["reject"])
    chat = parse_entry(line["entry"], line["position"], config.data.parent)
    tokens_2L = tokenize(chat, tokenizer, ids)
    encoded = []
    for clip in line["clips"]:
        unit, at = divmod(clip, config.clips_per_unit)
        result = work.encoded(unit)[at]
        if isinstance(result, Reject):
            raise result
        encoded.append(result)
    segments = [
        {
            "role": role,
            "frames": info["frames"],
            "seconds": info["seconds"],
            "source": clip.source,
            "sha256": info["sha256"],
        }
        for role, clip, (_, info) in zip(chat.roles, chat.clips, encoded, strict=True)
    ]
    meta = {
        "messages": stored_messages(chat),
        "start_index": chat.chat.start_index,
        "speaker": chat.chat.speaker,
        "misc": chat.chat.misc,
        "segments": segments,
    }
    codes = [codes_KT for codes_KT, _ in encoded]
    return Sample(chat.key, meta, tokens_2L, join_codes(codes, ids.codebooks))


def join_codes(codes: list[np.ndarray], codebooks: int) -> np.ndarray:
    """uint16 [K, ΣT] of several segments; [K, 0] of none."""
    return np.concatenate(codes, axis=1) if codes else np.zeros((codebooks, 0), np.uint16)


# the engine


def run_tasks(task: Callable[[int], Any], numbers: list[int], num_processes: int) -> Iterator[Any]:
    """Run tasks on this machine; results come as they finish. With one process, in this one."""
    if num_processes == 1 or len(numbers) < 2:
        yield from map(task, numbers)
        return
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    pool = ProcessPoolExecutor(num_processes, get_context("spawn"), torch.set_num_threads, (threads,))
    with pool:
        futures = [pool.submit(task, number) for number in numbers]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
