"""Lists out of shard sets, and what of a list is in the training data.

In: a shard set. Out: its held-out samples as lines; or the lines of a list whose audio, text or speaker the set's
training samples hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from higgs_tune.evaluate.lists import BadLine, Line, refuse_bad
from higgs_tune.preprocess.input.spoken_text import spoken_text
from higgs_tune.preprocess.judges.normalisers import Normaliser
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.format import Sample
from higgs_tune.shards.layout import parts_of
from higgs_tune.shards.reader import ShardSet


def read_split(location: str, split: str, audio_root: Path | None) -> list[Line]:
    """One split of a shard set as lines: each sample's last answer, in the voice of its first reference.

    Args:
        split: `train` or `val`.
        audio_root: where the relative audio paths of the set's data start.

    Raises:
        UserError: the split is empty, or samples without spoken text.
    """
    shards = ShardSet(location)
    rows = shards.rows_of(validation=split == "val")
    if not len(rows):
        raise UserError(f"the set holds no {split} samples", where=location, hint="See --val_fraction of preprocess.")
    samples = (shards.read(int(row)) for row in rows)
    return refuse_bad(((f"key {sample.key}", _line(sample, audio_root or Path())) for sample in samples), location)


def _line(sample: Sample, root: Path) -> Line | BadLine:
    segments = sample.meta["segments"]
    text = spoken_text(sample)
    if not text or not segments or segments[-1]["role"] != "assistant":
        return BadLine("the sample ends with no spoken answer")
    sources = [_source(segment, root) for segment in segments]
    reference = sources[0] if len(sources) > 1 else ""
    speaker = str(sample.meta.get("speaker") or "")
    return Line(sample.key, text, reference, _reference_text(sample), "", sources[-1], speaker)


def _source(segment: dict[str, Any], root: Path) -> str:
    source = segment["source"]
    return "" if source.startswith("inline:") else str((root / source).absolute())


def _reference_text(sample: Sample) -> str:
    """The text before the first audio in its message; empty where it is the only one."""
    for message in sample.meta["messages"]:
        parts = parts_of(message)
        kinds = [part["type"] for part in parts]
        if "audio" in kinds:
            at = kinds.index("audio")
            return parts[at - 1]["text"] if at and "text" in kinds[at + 1 :] else ""
    return ""


def find_leaks(lines: list[Line], hashes: dict[str, list[str]], location: str, chosen: Normaliser) -> dict[str, Any]:
    """What the training samples of a set share with a list.

    Args:
        hashes: SHA-256 of each line's audio files, by id.
        chosen: texts are equal when their normalised forms are.

    Returns:
        `audio`, `text`, `speaker`: ids of the lines (a speaker: its name) that the training samples hold;
        `compared`: the number of training samples; `set`: the location.
    """
    audio, texts, speakers = set[str](), set[str](), set[str]()
    samples = 0
    for sample in _training_samples(location):
        samples += 1
        audio |= {segment["sha256"] for segment in sample.meta["segments"]}
        texts.add(chosen.apply(spoken_text(sample)))
        speakers.add(str(sample.meta.get("speaker") or ""))
    return {
        "set": location,
        "compared": samples,
        "audio": [line.id for line in lines if audio.intersection(hashes.get(line.id, ()))],
        "text": [line.id for line in lines if chosen.apply(line.text) in texts - {""}],
        "speaker": sorted({line.speaker for line in lines} & speakers - {""}),
    }


def _training_samples(location: str) -> Iterator[Sample]:
    shards = ShardSet(location)
    for row in shards.rows_of(validation=False):
        yield shards.read(int(row))
    shards.close()
