"""The index of a set: one row a sample, as `index.npy` holds them. Fields: docs/format.md."""

from __future__ import annotations

import io

import numpy as np
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import SpecialIds, label_counts, mel_positions, packed_length

SPLIT_TRAIN, SPLIT_VAL = 0, 1


def index_dtype(key_chars: int) -> np.dtype:
    """The type of an index row.

    Args:
        key_chars: length of the set's longest key.
    """
    return np.dtype(
        [
            ("key", f"S{max(key_chars, 1)}"),
            ("shard", "<u4"),
            ("offset", "<u8"),
            ("length", "<u4"),
            ("xxh3", "<u8"),
            ("mel_offset", "<u8"),
            ("mel_length", "<u4"),
            ("mel_xxh3", "<u8"),
            ("tokens", "<u4"),
            ("mel_tokens", "<u4"),
            ("text_labels", "<u4"),
            ("audio_labels", "<u4"),
            ("audio_frames", "<u4"),
            ("seconds", "<f4"),
            ("speaker", "<u4"),
            ("split", "<u1"),
        ]
    )


def index_counts(sample: Sample, ids: SpecialIds, features: str) -> tuple[int, int, int, int, int, float]:
    """The fields of a sample's index row from `tokens` to `seconds`, in order."""
    text_labels, audio_labels = label_counts(sample, ids)
    tokens = packed_length(sample.tokens_2L.shape[1], sample.segment_frames, ids.codebooks)
    positions = sum(mel_positions(sample, features))
    seconds = sum(segment["seconds"] for segment in sample.meta["segments"])
    return tokens, positions, text_labels, audio_labels, sample.codes_KT.shape[1], seconds


def npy_bytes(index: np.ndarray) -> bytes:
    """The bytes of index.npy."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, index, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def join_index(rows: list[np.ndarray], speakers: list[list[str]]) -> tuple[np.ndarray, list[str]]:
    """One index from the rows of all shards, with speaker numbers; and the speaker names, by number."""
    names = sorted({name for shard in speakers for name in shard})
    number = {name: i for i, name in enumerate(names)}
    joined = np.concatenate(rows) if rows else np.zeros(0, index_dtype(1))
    key_chars = int(np.char.str_len(joined["key"]).max(initial=1))
    index = joined.astype(index_dtype(key_chars))
    index["speaker"] = [number[name] for shard in speakers for name in shard]
    return index, names


def totals(index: np.ndarray) -> dict[str, float | int]:
    """The manifest's totals: sums over the index rows."""
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
