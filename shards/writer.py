"""Writing a shard set: shard files first, each whole or absent, then the index, then the manifest that makes it valid.

In: samples in their final order, a shard at a time. Out: `codes-NNNNNN.tar`, `index.npy`, `rejects.jsonl`,
`manifest.json`. Never: a half-written file under a final name; a manifest before everything it names is in place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from . import durable
from .errors import ShardError
from .format import (
    FORMAT_VERSION,
    MAX_KEY_CHARS,
    SPLIT_TRAIN,
    SPLIT_VAL,
    Sample,
    checksum,
    encode_sample,
    index_dtype,
    tar_end,
)
from .sequence import SpecialIds, label_counts, packed_length

MANIFEST, INDEX, REJECTS = "manifest.json", "index.npy", "rejects.jsonl"


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of one shard file."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class ValidationSplit:
    """Which samples are held out: those whose hashed key (or speaker) falls below the fraction.

    The choice depends on nothing else, so it survives adding, removing and reordering samples.
    """

    fraction: float = 0.0
    by: str = "sample"  # or "speaker"

    def of(self, sample: Sample) -> int:
        name = str(sample.meta.get("speaker")) if self.by == "speaker" else sample.key
        held_out = xxhash.xxh3_64_intdigest(name.encode()) < self.fraction * 2**64
        return SPLIT_VAL if held_out else SPLIT_TRAIN


def shard_name(number: int, kind: str = "codes") -> str:
    return f"{kind}-{number:06d}.tar"


def write_shard(
    folder: Path, number: int, samples: Iterable[Sample], ids: SpecialIds, split: ValidationSplit
) -> tuple[ShardInfo, np.ndarray, list[str]]:
    """Write one shard file and read it back before it gets its name.

    Returns:
        What the manifest says of it; its index rows, in order (`speaker` is left 0); the speaker name of each row.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
        ShardError: what was read back differs from what was written.
    """
    path, sha256, rows, speakers, size = folder / shard_name(number), hashlib.sha256(), [], [], 0
    with durable.atomic_file(path) as file:
        for sample in samples:
            block = encode_sample(sample)
            rows.append(_index_row(sample, ids, split, number, size, block))
            speakers.append(str(sample.meta.get("speaker") or ""))
            file.write(block)
            sha256.update(block)
            size += len(block)
        end = tar_end(size)
        file.write(end)
        sha256.update(end)
        file.flush()
        _verify_written(Path(file.name), sha256.hexdigest(), path)
    info = ShardInfo(path.name, size + len(end), sha256.hexdigest(), len(rows))
    return info, np.array(rows, index_dtype(MAX_KEY_CHARS)), speakers


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify_written(temp: Path, expected: str, path: Path) -> None:
    got = file_sha256(temp)
    if got != expected:
        raise ShardError("what was read back differs from what was written", where=path, expected=expected, got=got)


def _index_row(
    sample: Sample, ids: SpecialIds, split: ValidationSplit, shard: int, offset: int, block: bytes
) -> tuple[Any, ...]:
    segments = sample.meta["segments"]
    text_labels, audio_labels = label_counts(sample, ids)
    tokens = packed_length(sample.tokens_2L.shape[1], sample.segment_frames, ids.codebooks)
    seconds = sum(segment["seconds"] for segment in segments)
    codes = (shard, offset, len(block), checksum(block))
    mel = (0, 0, 0)
    counts = (tokens, 0, text_labels, audio_labels, sample.codes_KT.shape[1], seconds)
    return (sample.key.encode(), *codes, *mel, *counts, 0, split.of(sample))


def finish_set(
    folder: Path,
    shards: list[ShardInfo],
    rows: list[np.ndarray],
    speakers: list[list[str]],
    rejects: list[dict[str, Any]],
    provenance: dict[str, Any],
) -> None:
    """Write index, rejects and, last, the manifest.

    Args:
        shards, rows, speakers: what `write_shard` returned, in shard order.
        rejects: one dict a sample left out, in input order: `id`, `reason`, `file`, `detail`.
        provenance: what made the codes and tokens; a trainer compares it with its checkpoint.
    """
    index, names = _join_index(rows, speakers)
    with durable.atomic_file(folder / INDEX) as file:
        np.lib.format.write_array(file, index, version=(1, 0), allow_pickle=False)
    durable.write_bytes(folder / REJECTS, b"".join(durable.to_json(reject) + b"\n" for reject in rejects))
    manifest = {
        "format_version": FORMAT_VERSION,
        "shards": [asdict(shard) for shard in shards],
        "index": _file_entry(folder / INDEX) | {"rows": len(index)},
        "rejects": _file_entry(folder / REJECTS) | {"rows": len(rejects), "by_reason": count_reasons(rejects)},
        "totals": totals(index),
        "speakers": names,
        "provenance": provenance,
    }
    durable.write_bytes(folder / MANIFEST, durable.to_json(manifest, indent=1) + b"\n")


def _join_index(rows: list[np.ndarray], speakers: list[list[str]]) -> tuple[np.ndarray, list[str]]:
    names = sorted({name for shard in speakers for name in shard})
    number = {name: i for i, name in enumerate(names)}
    joined = np.concatenate(rows) if rows else np.zeros(0, index_dtype(1))
    key_chars = int(np.char.str_len(joined["key"]).max(initial=1))
    index = joined.astype(index_dtype(key_chars))
    index["speaker"] = [number[name] for shard in speakers for name in shard]
    return index, names


def _file_entry(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def count_reasons(rejects: list[dict[str, Any]]) -> dict[str, int]:
    """Number of rejects by reason."""
    counts: dict[str, int] = {}
    for reject in rejects:
        counts[reject["reason"]] = counts.get(reject["reason"], 0) + 1
    return counts


def totals(index: np.ndarray) -> dict[str, float | int]:
    """Sums over the index rows, as the manifest holds them."""
    val = index["split"] == SPLIT_VAL
    return {
        "samples": len(index),
        "validation_samples": int(val.sum()),
        "seconds": round(float(index["seconds"].astype(np.float64).sum()), 3),
        "audio_frames": int(index["audio_frames"].sum()),
        "tokens": int(index["tokens"].sum()),
        "text_labels": int(index["text_labels"].sum()),
        "audio_labels": int(index["audio_labels"].sum()),
    }
