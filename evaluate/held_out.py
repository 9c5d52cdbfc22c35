"""Lists out of shard sets, and what of a list is in the training data.

In: a shard set. Out: its held-out samples as lines; or the lines of a list whose audio, text or speaker the set's
training samples hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from higgs_tune.evaluate.lists import BadLine, Line, placed
from higgs_tune.preprocess.audio.source import audio_sha256
from higgs_tune.preprocess.input.spoken_text import spoken_text
from higgs_tune.preprocess.judges.normalisers import Normaliser
from higgs_tune.preprocess.reject import Reject
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
        UserError: the split is empty.
    """
    shards = ShardSet(location)
    rows = shards.rows_of(validation=split == "val")
    if not len(rows):
        raise UserError(f"the set holds no {split} samples", where=location, hint="See --val_fraction of preprocess.")
    samples = (shards.read(int(row)) for row in rows)
    return placed(((f"key {sample.key}", _line(sample, audio_root or Path())) for sample in samples), split)


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


AUDIO = ("reference_audio", "target_audio")  # of a line


def audio_hashes(lines: list[Line]) -> dict[str, dict[str, set[str]]]:
    """SHA-256 of each line's references and of its target, by id; none of those that cannot be read."""
    hashes = {}
    for line in lines:
        references = (line.ref_audio, *(path for path, _text in line.other_references))
        hashes[line.id] = dict(zip(AUDIO, (_hashes(references), _hashes([line.target_audio])), strict=True))
    return hashes


def _hashes(paths: Iterable[str]) -> set[str]:
    hashes = set[str]()
    for path in filter(None, paths):
        with suppress(Reject):  # it is named where it is judged
            hashes.add(audio_sha256(path))
    return hashes


def find_leaks(
    lines: list[Line], hashes: dict[str, dict[str, set[str]]], location: str, chosen: Normaliser
) -> dict[str, Any]:
    """What the training samples of a set share with a list.

    Args:
        hashes: of `audio_hashes`.
        chosen: texts are equal when their normalised forms are.

    Returns:
        `reference_audio`, `target_audio`, `text`: ids of the lines that the training samples hold; `speaker`: names of
        speakers; `compared`: the number of training samples; `set`: the location.
    """
    audio, texts, speakers = set[str](), set[str](), set[str]()
    samples = 0
    for sample in _training_samples(location):
        samples += 1
        audio |= {segment["sha256"] for segment in sample.meta["segments"]}
        texts.add(chosen.apply(spoken_text(sample)))
        speakers.add(str(sample.meta.get("speaker") or ""))
    found = {name: [line.id for line in lines if audio & hashes.get(line.id, {}).get(name, set())] for name in AUDIO}
    return {
        "set": location,
        "compared": samples,
        **found,
        "text": [line.id for line in lines if chosen.apply(line.text) in texts - {""}],
        "speaker": sorted({line.speaker for line in lines} & speakers - {""}),
    }


def _training_samples(location: str) -> Iterator[Sample]:
    shards = ShardSet(location)
    for row in shards.rows_of(validation=False):
        yield shards.read(int(row))
    shards.close()
