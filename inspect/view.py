"""Ways to look at a shard set that several commands share: statistics, one sample's positions, its audio.

In: a `ShardSet`, and the codec or tokenizer that its manifest names. Out: plain values for a table, a file or a page.
Never: a change to the set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..shards.errors import UserError
from ..shards.format import FRAME_RATE_HZ, Sample
from ..shards.reader import ShardSet
from ..shards.sequence import expand


@dataclass(frozen=True)
class Checkpoints:
    """Where tokenizer and codec of a set are: what the user gave, else what the manifest remembers.

    Attributes:
        shards: the set.
        model_path, audio_tokenizer_path: given on the command line, or None.
    """

    shards: ShardSet
    model_path: Path | None
    audio_tokenizer_path: Path | None

    def _find(self, given: Path | None, name: str, flag: str) -> Path:
        path = given or Path(self.shards.provenance.get("paths", {}).get(name, ""))
        if not (path / "config.json").is_file():
            raise UserError(f"the {name} that made this set is not here", where=path, hint=f"Name it with {flag}.")
        return path

    @cached_property
    def tokenizer(self) -> Any:
        """The text tokenizer."""
        from ..preprocess.checkpoint import load_tokenizer  # imports transformers

        return load_tokenizer(self._find(self.model_path, "model", "--model_path"), self.shards.special_ids)

    @cached_property
    def codec(self) -> Any:
        """The audio tokenizer."""
        from ..preprocess.codec_checkpoint import load_codec  # imports torch

        return load_codec(self._find(self.audio_tokenizer_path, "codec", "--audio_tokenizer_path"))


def statistics(shards: ShardSet) -> dict[str, Any]:
    """Counts and sums of a set, from its manifest and index."""
    index = shards.index
    lengths = np.asarray(index["tokens"]) if len(index) else np.zeros(1)
    speakers = np.bincount(index["speaker"], minlength=len(shards.manifest["speakers"]))
    names = [name or "(none)" for name in shards.manifest["speakers"]]
    totals = shards.manifest["totals"]
    return {
        "samples": totals["samples"],
        "validation_samples": totals["validation_samples"],
        "hours": totals["seconds"] / 3600,
        "shards": len(shards.manifest["shards"]),
        "bytes": sum(shard["bytes"] for shard in shards.manifest["shards"]),
        "tokens": totals["tokens"],
        "text_labels": totals["text_labels"],
        "audio_labels": totals["audio_labels"],
        "length_percentiles": {str(p): int(np.percentile(lengths, p)) for p in (0, 5, 50, 95, 100)},
        "speakers": dict(zip(names, speakers.tolist(), strict=True)),
        "rejects": shards.manifest["rejects"]["by_reason"],
    }


@dataclass(frozen=True)
class Position:
    """One position of the expanded sequence. Labels stand where they are predicted, one before their target.

    modality: text, audio_in or audio_out. token: id, at a text position. codes: K delayed codes, at an audio position.
    text_label, audio_labels: what this position is trained to predict; None: nothing.
    """

    number: int
    modality: str
    token: int | None
    codes: list[int] | None
    text_label: int | None
    audio_labels: list[int] | None


def positions(sample: Sample, shards: ShardSet) -> Iterator[Position]:
    """Every position of a sample, as the model sees it."""
    seen = expand([sample], shards.special_ids)
    tokens = dict(zip(seen.text_at.tolist(), seen.text_ids.tolist(), strict=True))
    codes = dict(zip(seen.audio_at.tolist(), seen.codes_KA.T.tolist(), strict=True))
    text_labels = dict(zip(seen.text_label_at.tolist(), seen.text_labels.tolist(), strict=True))
    audio_labels = dict(zip(seen.audio_label_at.tolist(), seen.audio_labels_KB.T.tolist(), strict=True))
    modality = np.full(seen.length, "text", dtype=object)
    for start, width, is_out in seen.segments:
        modality[start : start + width] = "audio_out" if is_out else "audio_in"
    for at in range(seen.length):
        yield Position(at, modality[at], tokens.get(at), codes.get(at), text_labels.get(at), audio_labels.get(at))


def segment_codes(sample: Sample) -> list[np.ndarray]:
    """The raw codes [K, T] of each segment, in order."""
    return np.split(sample.codes_KT, np.cumsum(sample.segment_frames)[:-1], axis=1) if sample.segment_frames else []


def segment_label(number: int, segment: dict[str, Any]) -> str:
    """A short name of a segment: its number, `target` for what is to be said, `reference` for what is given."""
    kind = "target" if segment["role"] == "assistant" else "reference"
    return f"{number} {kind}, {segment['frames'] / FRAME_RATE_HZ:.2f} s, {segment['source']}"
