"""Writes a small synthetic set with the shards' writer, taking up what an earlier, killed run left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.shards.split import ValidationSplit
from higgs_tune.shards.writer import SetWriter

IDS = SpecialIds(audio_in=5, audio_out=6, stream_bos=1024, stream_eos=1025, codebooks=8)
SHARDS, PER_SHARD = 4, 12


def synthetic_sample(number: int, *, mel: bool = False, frames: tuple[int, int] = (5, 40)) -> Sample:
    """One sample with a reference and a target, made from its number alone."""
    rng = np.random.default_rng(number)
    tokens_2L = rng.integers(10, 500, (2, int(rng.integers(20, 60)))).astype(np.int32)
    tokens_2L[1, :10] = -100
    tokens_2L[0, 4], tokens_2L[0, 14] = IDS.audio_in, IDS.audio_out
    lengths = rng.integers(*frames, 2).tolist()
    segments: list[dict[str, Any]] = [
        {"role": role, "frames": length, "seconds": length / 25, "source": f"{number}.wav", "sha256": ""}
        for role, length in zip(("user", "assistant"), lengths, strict=True)
    ]
    mels: tuple[np.ndarray, ...] = ()
    if mel:
        mels = (rng.standard_normal((4, lengths[0] * 4)).astype(np.float16),)
        segments[0]["mel_frames"] = lengths[0] * 4
    meta = {"messages": [], "start_index": None, "speaker": f"s{number % 3}", "misc": None, "segments": segments}
    return Sample(f"{number:09d}", meta, tokens_2L, rng.integers(0, 1024, (8, sum(lengths))).astype(np.uint16), mels)


def shard_samples(shard: int, rejects: list[dict[str, Any]], *, mel: bool, per_shard: int) -> Iterator[Sample]:
    """The samples of one shard; every seventh is a reject."""
    for number in range(shard * per_shard, (shard + 1) * per_shard):
        if number % 7 == 6:
            rejects.append({"id": str(number), "reason": "made_up", "file": "", "detail": ""})
        else:
            yield synthetic_sample(number, mel=mel)


def build_set(
    out: Path, *, mel: bool = False, url: str | None = None, shards: int = SHARDS, per_shard: int = PER_SHARD
) -> None:
    """Write the set, or what is missing of it."""
    features = "mel" if mel else "none"
    writer = SetWriter(out, IDS, ValidationSplit(0.2), features=features, url=url)
    writer.begin()
    for shard in range(shards):
        if writer.committed(shard) is None:
            rejects: list[dict[str, Any]] = []
            writer.write(shard, shard_samples(shard, rejects, mel=mel, per_shard=per_shard), rejects)
    provenance = {"model": {"special_ids": IDS.to_dict()}, "features": {"whisper": features}}
    writer.finish(shards, provenance)
