"""The samples of a page as plain values: list rows and details. The report embeds them, the server sends them.

In: samples of a set. Out: dicts for JSON, without markup: the page makes text nodes of every string.
"""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
from higgs_tune.inspect.checkpoints import Checkpoints
from higgs_tune.inspect.stats import notes, prompt_layouts, set_name, speakers_by_split
from higgs_tune.inspect.view import Segment, all_text, facts, segments_of, speaker_of, target_text, turns_of, visible
from higgs_tune.shards.errors import ShardError
from higgs_tune.shards.format import FRAME_RATE_HZ, Sample
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import mel_positions

ClipId = Callable[[Segment], str]


def list_row(shards: ShardSet, row: int, sample: Sample, clip_id: ClipId) -> dict[str, Any]:
    """One line of the table: numbers, the target text, the first reference, the first target."""
    first: dict[str, Any] = {}
    for segment in segments_of(sample, shards.special_ids):
        seconds = segment.frames / FRAME_RATE_HZ
        first.setdefault(segment.kind, {"clip": clip_id(segment), "seconds": seconds, "number": segment.number})
    content = {"text": target_text(sample), "ref": first.get("ref"), "target": first.get("target")}
    return _indexed(shards, row) | {"speaker": speaker_of(sample)} | content


def damaged_row(shards: ShardSet, row: int, error: ShardError) -> dict[str, Any]:
    """The line of a sample that cannot be read: its index row, with the error in place of the text."""
    return _indexed(shards, row) | {"text": str(error), "ref": None, "target": None}


def _indexed(shards: ShardSet, row: int) -> dict[str, Any]:
    entry = shards.index[row]
    return {
        "row": row,
        "key": entry["key"].decode(),
        "speaker": shards.manifest["speakers"][int(entry["speaker"])],
        "split": "validation" if entry["split"] else "training",
        "seconds": round(float(entry["seconds"]), 2),
        "positions": int(entry["tokens"]) + int(entry["mel_tokens"]),
    }


def detail(shards: ShardSet, row: int, sample: Sample, checkpoints: Checkpoints, clip_id: ClipId) -> dict[str, Any]:
    """One sample without its codes and audio, which have ids of their own."""
    input_ids, label_ids = sample.tokens_2L.tolist()
    texts = [visible(checkpoints.token_text(token)) for token in input_ids]
    return {
        "row": row,
        "key": sample.key,
        "facts": facts(sample, shards.index[row]),
        "misc": sample.meta.get("misc"),
        "turns": [{"role": turn.role, "trained": turn.trained, "parts": turn.parts} for turn in turns_of(sample)],
        "ids": input_ids,
        "labels": label_ids,
        "texts": texts,
        "segments": [
            {
                "number": segment.number,
                "kind": segment.kind,
                "role": segment.role,
                "source": segment.source,
                "frames": segment.frames,
                "seconds": segment.seconds,
                "trained": segment.trained,
                "whisper": whisper,
                "clip": clip_id(segment),
            }
            for segment, whisper in zip(
                segments_of(sample, shards.special_ids), mel_positions(sample, shards.features), strict=True
            )
        ],
    }


def set_info(shards: ShardSet) -> dict[str, Any]:
    """Facts of the whole set that need no scan of its samples."""
    totals, provenance = shards.manifest["totals"], shards.provenance
    model, codec = provenance.get("model", {}), provenance.get("codec", {})
    layouts = prompt_layouts(shards)
    return {
        "name": set_name(shards),
        "samples": totals["samples"],
        "validation_samples": totals["validation_samples"],
        "hours": totals["seconds"] / 3600,
        "speakers": sum(map(bool, shards.manifest["speakers"])),
        "speakers_in_both_splits": speakers_by_split(shards)["both"],
        "notes": notes(shards),
        "positions": totals["tokens"],
        "layouts": layouts,
        "shards": len(shards.manifest["shards"]),
        "rejects": shards.manifest["rejects"]["rows"],
        "rejects_by_reason": shards.manifest["rejects"]["by_reason"],
        "ids": shards.special_ids.to_dict(),
        "frame_rate_hz": FRAME_RATE_HZ,
        "provenance": {
            "language model": str(model.get("name", "")),
            "codec": str(codec.get("name", "")),
            "codec weights": str(codec.get("weights_sha256", ""))[:16],
            "Whisper features": shards.features,
            "prompt layouts": ", ".join(f"{n:,} {name}" for name, n in layouts.items() if n),
            "manifest": shards.manifest_hash[:16],
        },
    }


def folded(text: str) -> str:
    """A text in the form that search compares: lower case, no accents, no vowel signs. page/source.js does the same."""
    decomposed = unicodedata.normalize("NFKD", text.replace("\u0640", ""))  # without the Arabic stretching stroke
    return "".join(c for c in decomposed if not unicodedata.category(c).startswith("M")).lower()


def searchable(sample: Sample) -> str:
    """The text of a sample that a search goes through."""
    return folded(f"{sample.key}\n{speaker_of(sample)}\n{all_text(sample)}")


def packed_codes(codes_KT: np.ndarray) -> bytes:
    """Raw codes in the page's format: little-endian uint16, codebook after codebook."""
    return codes_KT.astype("<u2").tobytes()


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
