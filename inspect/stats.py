"""Statistics of a shard set, from its index and from a scan of its samples.

In: a `ShardSet`. Out: plain numbers, ready for JSON. A damaged sample ends the scan with an error.

Shapes: K codebooks, C codes of a codebook.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.inspect.view import segments_of, target_text
from higgs_tune.preprocess.progress import ProgressBar
from higgs_tune.shards.errors import ShardError
from higgs_tune.shards.format import FRAME_RATE_HZ, Sample
from higgs_tune.shards.layout import LAYOUTS, layout_of
from higgs_tune.shards.plan import make_plan
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import SpecialIds, segment_positions

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
PROGRESS_EVERY = 256  # samples
NO_SPEAKER = "(none)"


@cache
def script_of(character: str) -> str:
    """The Unicode script of a letter by the first word of its name (`Arabic`, `Latin`, `Han`); empty for no letter."""
    if not unicodedata.category(character).startswith("L"):
        return ""
    name = unicodedata.name(character, "Unknown").split()[0].split("-")[0]
    return "Han" if name == "CJK" else name.capitalize()


def main_script(text: str) -> str:
    """The script of most of a text's letters; `none` without letters."""
    letters: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if script := script_of(character):
            letters[script] += count
    return max(letters, key=lambda name: (letters[name], name)) if letters else "none"


def letters_in(text: str) -> int:
    """Letters and digits; marks such as vowel signs do not count."""
    return sum(unicodedata.category(character)[0] in "LN" for character in text)


@dataclass
class ScanResult:
    """Counts over the samples that were read.

    Attributes:
        counts_KC: number of uses of each code.
        scripts, layouts: samples by the script of the target text, and by prompt layout.
        positions, labelled: positions of the expanded sequences by modality, and those with a label; audio labels are
            counted per codebook.
        target_s, reference_s: seconds of each segment.
        letters_per_s: speaking rate of each sample with one target.
    """

    counts_KC: np.ndarray
    samples: int = 0
    scripts: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)
    positions: Counter[str] = field(default_factory=Counter)
    labelled: Counter[str] = field(default_factory=Counter)
    target_s: list[float] = field(default_factory=list)
    reference_s: list[float] = field(default_factory=list)
    letters_per_s: list[float] = field(default_factory=list)

    def add(self, sample: Sample, ids: SpecialIds, whisper_positions: int) -> None:
        """Count one sample.

        Raises:
            ShardError: a code is beyond the codebook.
        """
        books, size = self.counts_KC.shape
        codes = sample.codes_KT
        if codes.size and (len(codes) != books or int(codes.max()) >= size):
            got = f"{len(codes)} codebooks, codes up to {codes.max()}"
            expected = f"{books} codebooks of {size}"
            raise ShardError("codes out of range", where=f"sample {sample.key}", expected=expected, got=got)
        flat = codes.astype(np.int64) + np.arange(books)[:, None] * size
        self.counts_KC += np.bincount(flat.ravel(), minlength=books * size).reshape(books, size)
        self.samples += 1
        segments, text = segments_of(sample, ids), target_text(sample)
        self.layouts[layout_of(sample.meta["messages"])] += 1
        self.scripts[main_script(text)] += 1
        self.positions["text"] += sample.tokens_2L.shape[1] - len(segments)
        self.positions["whisper"] += whisper_positions
        places = np.isin(sample.tokens_2L[0], (ids.audio_in, ids.audio_out))
        self.labelled["text"] += int((sample.tokens_2L[1][~places] >= 0).sum())
        outputs = (sample.tokens_2L[0][places] == ids.audio_out).tolist()
        for segment, is_output in zip(segments, outputs, strict=True):
            self.positions["audio_out" if is_output else "audio_in"] += segment_positions(segment.frames, books)
            self.labelled["audio_out"] += (segment.frames + 1) if segment.trained else 0
            seconds = segment.frames / FRAME_RATE_HZ
            (self.target_s if segment.trained else self.reference_s).append(seconds)
        targets = [segment.seconds for segment in segments if segment.trained]
        if len(targets) == 1 and targets[0] > 0:
            self.letters_per_s.append(letters_in(text) / targets[0])


def evenly(count: int, most: int | None) -> list[int]:
    """At most `most` row numbers, spread evenly over `count`."""
    if most is None or most >= count:
        return list(range(count))
    return np.unique(np.linspace(0, count - 1, most).round().astype(int)).tolist()


def scan_samples(shards: ShardSet, max_samples: int | None = None) -> ScanResult:
    """Read and count samples, with progress on stderr."""
    ids = shards.special_ids
    size = shards.provenance["model"].get("codebook_size") or ids.stream_bos
    result = ScanResult(np.zeros((ids.codebooks, size), np.int64))
    rows = evenly(len(shards), max_samples)
    with ProgressBar() as progress:
        progress.start("scan", len(rows), "samples")
        for done, row in enumerate(rows):
            result.add(shards.read(row), ids, int(shards.index["mel_tokens"][row]))
            if done % PROGRESS_EVERY == PROGRESS_EVERY - 1:
                progress.advance(PROGRESS_EVERY)
        progress.advance(len(rows) % PROGRESS_EVERY)
    return result


def statistics(shards: ShardSet, scanned: ScanResult, tokens_per_pack: int) -> dict[str, Any]:
    """The output of `higgs-inspect stats`, by name."""
    index, totals = shards.index, shards.manifest["totals"]
    lengths = packed_lengths(shards)
    speakers = np.bincount(index["speaker"], minlength=len(shards.manifest["speakers"]))
    names = [name or NO_SPEAKER for name in shards.manifest["speakers"]]
    by_speaker = dict(zip(names, speakers.tolist(), strict=True))
    return {
        "samples": totals["samples"],
        "validation_samples": totals["validation_samples"],
        "hours": totals["seconds"] / 3600,
        "tokens": int(lengths.sum()),
        "text_labels": totals["text_labels"],
        "audio_labels": totals["audio_labels"],
        "whisper_features": shards.features,
        "speakers": dict(sorted(by_speaker.items(), key=lambda item: (-item[1], item[0]))),
        "speakers_by_split": speakers_by_split(shards),
        "samples_without_audio_target": int((index["audio_labels"] == 0).sum()),
        "samples_without_speaker": by_speaker.get(NO_SPEAKER, 0),
        "prompt_layouts": prompt_layouts(shards, scanned),
        "scanned_samples": scanned.samples,
        "languages_by_script": dict(scanned.scripts.most_common()),
        "length_percentiles": percentiles(lengths),
        "target_seconds_percentiles": percentiles(scanned.target_s),
        "reference_seconds_percentiles": percentiles(scanned.reference_s),
        "letters_per_second_percentiles": percentiles(scanned.letters_per_s),
        "pack_fill": pack_fill(shards, tokens_per_pack),
        "label_shares": label_shares(scanned),
        "code_usage": code_usage(scanned.counts_KC),
        "shards": len(shards.manifest["shards"]),
        "bytes": sum(shard["bytes"] for shard in shards.manifest["shards"]),
        "disk_bytes": disk_bytes(shards),
        "rejects": shards.manifest["rejects"]["by_reason"],
    }


def prompt_layouts(shards: ShardSet, scanned: ScanResult | None = None) -> dict[str, int]:
    """Samples by prompt layout: the manifest's counts; of an older set, those of the samples that were read."""
    counts = shards.manifest.get("layouts") or (scanned.layouts if scanned else {})
    return {name: int(counts.get(name, 0)) for name in LAYOUTS} if counts else {}


def speakers_by_split(shards: ShardSet) -> dict[str, int]:
    """Number of named speakers with training samples, with validation samples, and with both."""
    names = np.array([bool(name) for name in shards.manifest["speakers"]], bool)
    speakers = shards.index["speaker"]
    training, validation = (
        np.bincount(speakers[shards.rows_of(validation=held_out)], minlength=len(names)).astype(bool) & names
        for held_out in (False, True)
    )
    counts = {"training": training, "validation": validation, "both": training & validation}
    return {name: int(count.sum()) for name, count in counts.items()}


def notes(shards: ShardSet) -> list[str]:
    """Properties of a set that limit its use, in words."""
    samples, index = len(shards), shards.index
    if not samples:
        return ["the set holds no sample"]
    texts, speakers = [], shards.manifest["speakers"]
    if without := int((index["audio_labels"] == 0).sum()):
        texts.append(f"{without:,} of {samples:,} samples have no audio target: the model learns no speech from them")
    layouts = prompt_layouts(shards)
    if layouts and not layouts["serve"]:
        texts.append(
            "no sample has the prompt layout serve, which serving engines send: a model tuned on this set alone keeps "
            "its reference voice in higgs-speak only (--prompt_layout serve or both)"
        )
    if layouts.get("other"):
        texts.append(f"{layouts['other']:,} of {samples:,} samples are in neither prompt layout")
    if unnamed := int((index["speaker"] == speakers.index("")).sum()) if "" in speakers else 0:
        texts.append(f"{unnamed:,} of {samples:,} samples have no speaker name")
    split = speakers_by_split(shards)
    if not len(shards.rows_of(validation=True)):
        texts.append("no sample is held out for validation")
    elif split["both"]:
        shared = f"{split['both']:,} of the {split['validation']:,} speakers of the validation split"
        texts.append(f"{shared} are in the training split too: validation does not measure unseen voices")
    return texts


def packed_lengths(shards: ShardSet) -> np.ndarray:
    """int64 [samples]: positions of each sample, Whisper features included."""
    return shards.index["tokens"].astype(np.int64) + shards.index["mel_tokens"]


def percentiles(values: Any) -> dict[str, float]:
    """Values by percentile; empty without values."""
    if not len(values):
        return {}
    return {str(p): round(float(v), 3) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def pack_fill(shards: ShardSet, tokens_per_pack: int) -> dict[str, Any]:
    """Fill of the first epoch's packs at a budget; samples longer than the budget are counted and left out."""
    rows = shards.rows_of(validation=False)
    lengths = packed_lengths(shards)[rows]
    fits = lengths <= tokens_per_pack
    options = {"tokens_per_pack": tokens_per_pack, "seed": 42, "epoch": 0, "set_hash": shards.manifest_hash}
    packs = len(make_plan(rows[fits], lengths[fits], **options))
    return {
        "tokens_per_pack": tokens_per_pack,
        "packs": packs,
        "fill": int(lengths[fits].sum()) / (packs * tokens_per_pack) if packs else 0.0,
        "samples_too_long": int((~fits).sum()),
    }


def label_shares(scanned: ScanResult) -> dict[str, float]:
    """Each modality's share of all positions, and the share of its positions that have a label."""
    every = sum(scanned.positions.values()) or 1
    shares = {f"{name}_positions": count / every for name, count in scanned.positions.items()}
    for name in ("text", "audio_out"):
        shares[f"{name}_labelled"] = scanned.labelled[name] / (scanned.positions[name] or 1)
    return shares


def code_usage(counts_KC: np.ndarray) -> dict[str, Any]:
    """Entropy of each codebook in bits, number of its codes that never occur, size of a codebook."""
    shares = counts_KC / np.maximum(counts_KC.sum(1, keepdims=True), 1)
    bits = -(shares * np.log2(shares, out=np.zeros_like(shares), where=shares > 0)).sum(1)
    return {
        "codebook_size": counts_KC.shape[1],
        "entropy_bits": [round(float(value), 4) + 0.0 for value in bits],
        "dead_codes": (counts_KC == 0).sum(1).tolist(),
        "frames": int(counts_KC[0].sum()) if len(counts_KC) else 0,
    }


def disk_bytes(shards: ShardSet) -> dict[str, int]:
    """Bytes by kind of file."""
    manifest = shards.manifest
    sizes = {
        "codes": sum(file["bytes"] for file in manifest["shards"]),
        "mel": sum(file["bytes"] for file in manifest["mel_shards"]),
        "index": manifest["index"]["bytes"],
        "rejects": manifest["rejects"]["bytes"],
    }
    return {**sizes, "total": sum(sizes.values())}


def set_name(shards: ShardSet) -> str:
    """A short name of the set: the last part of its path or URL."""
    return (
        shards.location.rstrip("/").rpartition("/")[2] if shards.source.remote else Path(shards.location).resolve().name
    )
