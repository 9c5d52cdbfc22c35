"""Small shard sets for the inspector's tests: real messages and tokens, random codes, Whisper features if wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from conftest import EXAMPLES
from higgs_tune.preprocess.checkpoints.checkpoint import describe_checkpoint, load_tokenizer, read_config, special_ids
from higgs_tune.preprocess.codec.weights import weights_sha256
from higgs_tune.preprocess.input.chatml import parse_entry, stored_messages, tokenize
from higgs_tune.shards.format import Sample
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.shards.split import ValidationSplit
from higgs_tune.shards.writer import SetWriter
from transformers import PreTrainedTokenizerBase

HOSTILE = """<script>window.hacked = 1</script><img src=x onerror="hacked=1">'"</title></script>&lt;b&gt;<!--"""


class SampleMaker:
    """Samples of the Arabic example with random codes; the same number always gives the same sample."""

    def __init__(self, toy: Path, *, frames: int = 20, features: bool = False) -> None:
        self.ids: SpecialIds = special_ids(read_config(toy / "model"), toy)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(toy / "model", self.ids)
        self.entries: list[dict[str, Any]] = json.loads(EXAMPLES.read_text())
        self.frames, self.features = frames, features

    def __call__(self, number: int, **changes: Any) -> Sample:
        """One sample; `changes` replace fields of its ChatML entry."""
        entry = self.entries[number % len(self.entries)] | {"id": f"clip-{number:06d}"} | changes
        chat = parse_entry(entry, number)
        rng = np.random.default_rng(number)
        frames = rng.integers(self.frames // 2, 2 * self.frames, len(chat.clips)).tolist()
        segments: list[dict[str, Any]] = [
            {"role": role, "frames": length, "seconds": length / 25, "source": clip.source, "sha256": ""}
            for role, clip, length in zip(chat.roles, chat.clips, frames, strict=True)
        ]
        mels = []
        if self.features:
            for segment in segments:
                segment["mel_frames"] = 4 * segment["frames"]
                mels.append(rng.normal(size=(8, segment["mel_frames"])).astype(np.float16))
        meta = {
            "messages": stored_messages(chat),
            "start_index": chat.chat.start_index,
            "speaker": chat.chat.speaker,
            "misc": chat.chat.misc,
            "segments": segments,
        }
        codes_KT = rng.integers(0, 1024, (self.ids.codebooks, sum(frames))).astype(np.uint16)
        return Sample(chat.key, meta, tokenize(chat, self.tokenizer, self.ids), codes_KT, tuple(mels))


def write_set(folder: Path, toy: Path, shards: list[list[Sample]], *, features: str = "none") -> ShardSet:
    """Write a set as higgs-preprocess would."""
    ids = special_ids(read_config(toy / "model"), toy)
    writer = SetWriter(folder, ids, ValidationSplit(0.1), features=features)
    writer.begin()
    for number, samples in enumerate(shards):
        writer.write(number, samples, [{"id": f"x{number}", "reason": "too_long", "file": "x.wav", "detail": HOSTILE}])
    provenance = {
        "model": describe_checkpoint(toy / "model"),
        "codec": {"name": "codec", "weights_sha256": weights_sha256(toy / "codec")},
        "features": {"whisper": features},
        "request": {"options": {"val_fraction": 0.1, "val_by": "sample"}},
        "paths": {"model": str(toy / "model"), "codec": str(toy / "codec")},
    }
    writer.finish(len(shards), provenance)
    return ShardSet(folder)
