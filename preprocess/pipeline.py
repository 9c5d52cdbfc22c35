"""The main path of higgs-preprocess: list, encode, assemble, finish.

In: ChatML, a manifest or a datasets folder, and two checkpoints. Out: a finished shard set (shards/format.py) and a
summary.

1. list      read and check every entry; number the distinct clips; write the contents of each shard and unit (listing)
2. encode    turn each unit of clips into codes and, on request, Whisper features (encode)
3. assemble  make each shard's samples from tokens, labels, codes and features; write its files (assemble)
4. finish    write index, rejects, and last the manifest (shards/writer)

Steps 2 and 3 are tasks that know only a number, so any engine can run them (engine).
Guarantees: each distinct clip is encoded once; a sample is in the set or in rejects.jsonl; the bytes depend neither on
the engine nor on the number of processes nor on kills and restarts (tests/test_preprocess.py, test_bad_input.py,
test_engine.py).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from higgs_tune.preprocess.assemble import assemble_shard, set_writer
from higgs_tune.preprocess.audio.whisper import extractor_settings, mel_bins_of, require_tower, tower_sha256
from higgs_tune.preprocess.checkpoints.checkpoint import describe_checkpoint, read_config, special_ids
from higgs_tune.preprocess.checkpoints.hub import CONFIG_FILES, local_checkpoint, name_of
from higgs_tune.preprocess.codec.checkpoint import load_codec
from higgs_tune.preprocess.codec.weights import weights_sha256
from higgs_tune.preprocess.config import Job, PreprocessConfig
from higgs_tune.preprocess.encode import device_of, encode_unit
from higgs_tune.preprocess.engine import Stop, run_tasks
from higgs_tune.preprocess.input.folders import data_digest
from higgs_tune.preprocess.listing import list_work
from higgs_tune.preprocess.progress import ProgressBar
from higgs_tune.preprocess.text_tokens import cached_tokenizer
from higgs_tune.preprocess.workdir import WorkFolder, refuse_other
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.index import SPLIT_VAL
from higgs_tune.shards.manifest import MANIFEST
from higgs_tune.shards.remote import Cache, Source, is_url
from higgs_tune.shards.split import split_sides
from higgs_tune.shards.writer import REJECTS, count_reasons


def build_shards(config: PreprocessConfig) -> dict[str, Any]:
    """Build a shard set, or continue one.

    Returns:
        `samples`, `seconds`, `clips`, `encoded_seconds`, `flags` and `spent` (of this run), `rejects` (a dict by
        reason), `advice` (on missing files), `sides` (of the validation split), `already_built`.

    Raises:
        UserError: bad paths, checkpoints or options; or every sample was rejected.
        Stopped: a signal came; the tasks in hand are committed.
    """
    with Stop() as stop:
        job = make_job(config)
        provenance = make_provenance(job)
        stop.check()
        made = finished(job.url or str(job.out), provenance["request"])
        if made is None:
            return _run_steps(job, provenance, stop)
    set_writer(job).clear()  # left by a run that was killed right after the manifest
    return {"already_built": True, "samples": made["totals"]["samples"], "rejects": made["rejects"]["by_reason"]}


def _run_steps(job: Job, provenance: dict[str, Any], stop: Stop) -> dict[str, Any]:
    """Run the four steps; reuse what an earlier run committed, but try its rejects again."""
    config, work, writer = job.config, WorkFolder(job.out), set_writer(job)
    with ProgressBar() as progress, work.locked():
        writer.begin()
        work.begin(provenance["request"])
        listing = work.listing
        if listing is None or listing["unsettled"] or any(work.done(listing["units"]).values()):
            listing = list_work(job, work, stop.check)

        done = {unit for unit, rejected in work.done(listing["units"]).items() if not rejected}
        progress.start("encode", listing["clips"], "clips")
        progress.skip(min(len(done) * config.clips_per_unit, listing["clips"]))
        waiting = [unit for unit in range(listing["units"]) if unit not in done]
        for stats in run_tasks(partial(encode_unit, job), waiting, config, stop):
            progress.add_unit(stats)

        numbers = range(listing["shards"])
        waiting = [number for number in numbers if (shard := writer.committed(number)) is None or shard.rejects]
        progress.start("assemble", listing["shards"], "shards")
        progress.skip(listing["shards"] - len(waiting))
        for _ in run_tasks(partial(assemble_shard, job), waiting, config, stop):
            progress.advance(1)

        shards = [shard for shard in map(writer.committed, range(listing["shards"])) if shard is not None]
        rejects = [reject for shard in shards for reject in shard.rejects]
        if not any(len(shard.rows) for shard in shards):
            writer.discard(shards)  # the same command starts anew
            durable.write_bytes(job.out / REJECTS, b"".join(durable.to_json(reject) + b"\n" for reject in rejects))
            hints = [f"Each is named in {job.out / REJECTS}.", audio_advice(rejects, job)]
            raise UserError("no sample is left", where=job.data, got=f"rejects by reason: {count_reasons(rejects)}",
                            hint=" ".join(filter(None, hints)))  # fmt: skip
        totals = writer.finish(listing["shards"], provenance)["totals"]
    index, names = writer.joined(shards)
    return {
        "already_built": False,
        "samples": totals["samples"],
        "seconds": totals["seconds"],
        "clips": listing["clips"],
        "encoded_seconds": progress.encoded_seconds,
        "flags": progress.flags,
        "spent": progress.spent,
        "rejects": count_reasons(rejects),
        "advice": audio_advice(rejects, job),
        "sides": split_sides(index["split"] == SPLIT_VAL, [names[number] for number in index["speaker"]]),
    }


def audio_advice(rejects: list[dict[str, Any]], job: Job) -> str:
    """What would make the files found that rejects name as missing or outside; empty where nothing does."""
    return job.audio_paths.advice(reject["file"] for reject in rejects if reject["reason"] in NOT_FOUND)


def finished(location: str, request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the requested set where it is finished at this folder or URL, else None.

    Raises:
        UserError: it holds another set.
    """
    try:
        data = Source(location).read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return None
    manifest = durable.from_json(data, "the manifest", f"{location}/{MANIFEST}")
    provenance = manifest.get("provenance")
    refuse_other(provenance.get("request") if isinstance(provenance, dict) else None, request, "a shard set made from",
                 location)  # fmt: skip
    return manifest


def make_job(config: PreprocessConfig) -> Job:
    """Resolve the options: absolute paths, and checkpoints from the Hub as local folders.

    Raises:
        UserError: a path does not exist, or a checkpoint cannot be used.
    """
    if not config.data.exists():
        raise UserError("no data here", where=config.data)
    if config.audio_root and not config.audio_root.is_dir():
        raise UserError("--audio_root is no folder", where=config.audio_root)
    codec_given, out = config.audio_tokenizer_path, local_out(config)
    model = local_checkpoint(config.model_path, CONFIG_FILES)
    codec = local_checkpoint(codec_given) if codec_given else None
    tower = local_checkpoint(config.whisper_path) if config.whisper_path else model
    if config.whisper_features == "encoder" and not config.whisper_path:
        tower = local_checkpoint(config.model_path)
    if config.whisper_features == "encoder":
        require_tower(tower)
    if config.audio_root:
        config = replace(config, audio_root=config.audio_root.absolute())
    job = Job(config, config.data.absolute(), out.absolute(), model, codec, tower)
    refuse_unfit(job)
    return job


def refuse_unfit(job: Job) -> None:
    """Refuse unusable checkpoints and devices before anything is encoded.

    Raises:
        UserError: tokenizer, codec or device cannot be used, or the codec's codes are not the model's.
    """
    config = read_config(job.model)
    ids = special_ids(config, job.model / "config.json")
    cached_tokenizer(job.model, ids)
    if job.config.engine == "local":
        device_of(job)
    if job.codec is None:
        return
    codec = load_codec(job.codec).config
    size = config.get("audio_codebook_size", ids.stream_bos)
    if (codec.codebooks, codec.codebook_size) != (ids.codebooks, size):
        expected, got = f"{ids.codebooks} codebooks of {size}", f"{codec.codebooks} of {codec.codebook_size}"
        raise UserError(f"the codec does not fit the model {job.model}", where=job.codec, expected=expected, got=got)


def local_out(config: PreprocessConfig) -> Path:
    """The folder where the set is built: --out, or for a URL a staging folder that depends on the URL alone."""
    out = config.out or ""
    if not is_url(out):
        return Path(out)
    name = hashlib.sha256(out.rstrip("/").encode()).hexdigest()[:16]
    return config.staging or Cache.default().folder / "staging" / name


def make_provenance(job: Job) -> dict[str, Any]:
    """The provenance: data, model, codec, options. `paths` only help the inspector; nothing checks them."""
    config, codec_given = job.config, job.config.audio_tokenizer_path
    assert codec_given is not None and job.codec is not None
    model = describe_checkpoint(job.model) | name_of(config.model_path)
    codec = name_of(codec_given) | {
        "weights_sha256": weights_sha256(job.codec),
        "precision": config.precision,
        "tf32": config.tf32,
    }
    features = whisper_provenance(job)
    options = {name: value for name, value in asdict(config).items() if name not in MACHINE_ONLY}
    options["audio_root"] = str(config.audio_root.resolve()) if config.audio_root else None
    request = {"data": data_digest(job.data), "model": model, "codec": codec, "features": features, "options": options}
    request = json.loads(durable.to_json(request))  # as it will be compared with a stored one
    paths = {"model": str(job.model), "codec": str(job.codec)}
    made = {"model": model, "codec": codec, "features": features, "text_normalization": config.text_normalization}
    return made | {"request": request, "paths": paths}


NOT_FOUND = ("missing_audio", "outside_audio_root")  # rejects that another --audio_root may cure
# options of where and how the work runs; they do not change the set
MACHINE_ONLY = {
    *("data", "out", "staging", "model_path", "audio_tokenizer_path", "whisper_path"),
    *("engine", "ray_address", "num_processes", "decode_threads", "device"),
    *("check", "json", "max_reject_share", "allow_text_only", "debug"),
}


def whisper_provenance(job: Job) -> dict[str, Any]:
    """The Whisper features of the set: their kind, the roles that have them, and their extractor."""
    kind = job.config.whisper_features
    if kind == "none":
        return {"whisper": kind}
    settings = extractor_settings(mel_bins_of(job.tower))
    made = {"whisper": kind, "roles": job.config.whisper_roles, "extractor": settings}
    return made | ({"tower_sha256": tower_sha256(job.tower)} if kind == "encoder" else {})
