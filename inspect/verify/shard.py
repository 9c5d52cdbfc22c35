"""Verification of one shard: its files against the manifest and the index, its samples against the rules.

In: a `ShardTask`, which any process can run. Out: a `ShardResult`: findings, and index rows computed from the shard.
The index is not trusted: the tar is walked from header to header, and the index only says which samples to expect.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.inspect.verify.diagnose import Finding, Member, describe_damage, walk
from higgs_tune.inspect.verify.sample_checks import SampleRules, meta_problems
from higgs_tune.inspect.view import speaker_of
from higgs_tune.shards.errors import ShardError
from higgs_tune.shards.format import (
    CODES,
    MAX_KEY_CHARS,
    MEL,
    META,
    TOKENS,
    Sample,
    checksum,
    decode_mels,
    decode_sample,
)
from higgs_tune.shards.index import index_counts
from higgs_tune.shards.index import index_dtype as row_dtype
from higgs_tune.shards.split import ValidationSplit
from higgs_tune.shards.writer import INDEX

MOST_ROW_FINDINGS = 1000  # of a kind and shard: a broken index breaks every row


@dataclass(frozen=True)
class ShardTask:
    """The input of one shard's verification.

    Attributes:
        folder: of the set. number: of the shard.
        entry, mel_entry: the manifest's entries of its files.
        rows: its index rows; None where the index is lost or is not the manifest's.
        others: file names by SHA-256, to name swapped files.
        split: the rule of the validation split; None where it is unknown.
        tokenizer: its folder, for --deep.
    """

    folder: Path
    number: int
    entry: dict[str, Any]
    mel_entry: dict[str, Any] | None
    rows: np.ndarray | None
    rules: SampleRules
    features: str
    others: dict[str, str]
    split: ValidationSplit | None
    deep: bool
    tokenizer: Path | None


@dataclass
class ShardResult:
    """The result of one shard's verification.

    Attributes:
        rows: index rows computed from the intact samples; speakers: the speaker of each.
        unknown_turns: number of samples whose tokens cannot be assigned to messages.
        whole: the files are those of the manifest.
    """

    findings: list[Finding] = field(default_factory=list)
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    speakers: list[str] = field(default_factory=list)
    unknown_turns: int = 0
    whole: bool = True

    def array(self) -> np.ndarray:
        return np.array(self.rows, row_dtype(MAX_KEY_CHARS))


@contextmanager
def mapped_file(path: Path) -> Iterator[memoryview]:
    """A file's bytes, memory-mapped."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            yield memoryview(b"")
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            yield view


def check_file(view: memoryview, entry: dict[str, Any], others: dict[str, str]) -> Finding | None:
    """Compare size and SHA-256 of a file with the manifest's; `others` names files by their SHA-256."""
    name = entry["name"]
    got = hashlib.sha256(view).hexdigest()
    if got == entry["sha256"] and len(view) == entry["bytes"]:
        return None
    if others.get(got, name) != name:
        return Finding("swapped_file", f"its content is that of {others[got]}", name)
    if len(view) != entry["bytes"]:
        return Finding("wrong_size", f"expected {entry['bytes']} bytes, got {len(view)}", name)
    return Finding("wrong_sha256", f"expected {entry['sha256']}, got {got}", name)


def verify_shard(task: ShardTask) -> ShardResult:
    """Check one shard's codes file, and its mel file where it has one."""
    result = ShardResult()
    mels = _mel_blocks(task, result) if task.mel_entry else {}
    path = task.folder / task.entry["name"]
    if not path.is_file():
        result.findings.append(Finding("missing_file", "the manifest names it", path.name))
        result.whole = False
        return result
    with mapped_file(path) as view:
        if wrong := check_file(view, task.entry, task.others):
            result.findings.append(wrong)
            result.whole = False
            if wrong.kind == "swapped_file":
                return result
        members, damage = walk(view, path.name)
        blocks, loose = _samples(members, path.name)
        damaged = _compare_with_index(task, result, view, blocks, damage + loose)
        for key, (offset, length) in blocks.items():
            if key in damaged:
                continue
            _check_sample(task, result, key, bytes(view[offset : offset + length]), offset, mels.get(key, (0, 0, 0)))
    count = len(blocks)
    if task.entry["samples"] != count:
        result.findings.append(
            Finding("wrong_count", f"expected {task.entry['samples']} samples, got {count}", path.name)
        )
    return result


def _samples(members: list[Member], file: str) -> tuple[dict[str, tuple[int, int]], list[Finding]]:
    """Whole samples of a codes file: (offset, length) by key, in order; and findings on the other members."""
    blocks: dict[str, tuple[int, int]] = {}
    findings, at = [], 0
    while at < len(members):
        key = members[at].name.partition(".")[0]
        group = members[at : at + 3]
        names = [member.name for member in group]
        if names == [f"{key}.{suffix}" for suffix in (CODES, META, TOKENS)] and group[-1].offset == group[-2].end:
            if key in blocks:
                findings.append(
                    Finding("duplicate_key", "the key occurs twice in the shard", file, key, group[0].offset)
                )
            blocks[key] = (group[0].offset, group[-1].end - group[0].offset)
            at += 3
        else:
            findings.append(
                Finding("stray_member", f"{names[0]} is part of no whole sample", file, key, group[0].offset)
            )
            at += 1
    return blocks, findings


def _compare_with_index(
    task: ShardTask, result: ShardResult, view: memoryview, blocks: dict[str, tuple[int, int]], damage: list[Finding]
) -> set[str]:
    """Add findings on samples that differ from their index rows, then on damage outside of those samples.

    Returns:
        The keys of the samples that differ.
    """
    if task.rows is None:
        result.findings += damage
        return set()
    name, wrong, lost, intact = task.entry["name"], {}, [], result.whole
    for entry in task.rows:
        key, offset, length = entry["key"].decode(), int(entry["offset"]), int(entry["length"])
        block = bytes(view[offset : offset + length])
        if len(block) == length and checksum(block) == entry["xxh3"]:
            continue
        wrong[key] = (offset, offset + length)
        if intact:
            detail = f"bytes {offset} to {offset + length} of {name}, an intact file, are not this sample"
            result.findings.append(Finding("wrong_index_row", detail, INDEX, key, offset))
        elif offset >= len(view):
            lost.append(key)
        elif len(wrong) <= MOST_ROW_FINDINGS:
            result.findings.append(_damaged(name, key, offset, length, block))
    if len(wrong) > MOST_ROW_FINDINGS and not intact:
        detail = f"and {len(wrong) - MOST_ROW_FINDINGS} more samples"
        result.findings.append(Finding("damaged_sample", detail, name))
    if lost:
        detail = f"{len(lost)} samples are cut off, from {lost[0]} to {lost[-1]}"
        result.findings.append(Finding("lost_samples", detail, name, lost[0], len(view)))
    indexed = {key.decode() for key in task.rows["key"].tolist()}
    for key in sorted(blocks.keys() - indexed):
        result.findings.append(Finding("unindexed_sample", "the index does not name it", name, key, blocks[key][0]))
    spans = wrong.values()
    result.findings += [one for one in damage if not any(start <= (one.offset or 0) < end for start, end in spans)]
    return set(wrong)


def _damaged(name: str, key: str, offset: int, length: int, block: bytes) -> Finding:
    if len(block) < length:
        detail = f"the file ends after {len(block)} of its {length} bytes"
        return Finding("cut_sample", detail, name, key, offset)
    return Finding("damaged_sample", describe_damage(block, decode_sample), name, key, offset)


def _check_sample(
    task: ShardTask, result: ShardResult, key: str, block: bytes, offset: int, mel: tuple[int, int, int]
) -> None:
    """Decode one sample, check it against the rules, and add the index row computed from it."""
    name = task.entry["name"]

    def add(kind: str, detail: str) -> None:
        result.findings.append(Finding(kind, detail, name, key, offset))

    try:
        sample = decode_sample(block, f"{name}, key {key}")
    except ShardError as error:
        add("damaged_sample", str(error))
        return
    if problem := next(meta_problems(sample.meta), ""):
        add("damaged_metadata", problem)
        return
    problems = list(task.rules.check(sample))
    for kind, detail in problems:
        add(kind, detail)
    result.unknown_turns += not problems and not task.rules.turns_known(sample)
    if not problems and task.deep and task.tokenizer:
        from higgs_tune.inspect.verify.retokenize import tokens_differ  # imports transformers

        if difference := tokens_differ(sample, task.tokenizer, task.rules.ids):
            add("other_tokens", difference)
    try:
        counts = index_counts(sample, task.rules.ids, task.features)
    except ShardError:
        return  # a rule has named the damage
    split = task.split.of(sample) if task.split else 0
    result.rows.append((key.encode(), task.number, offset, len(block), checksum(block), *mel, *counts, 0, split))
    result.speakers.append(speaker_of(sample))
    if task.deep and mel[1]:
        result.findings += _check_mel(task, sample, mel)


def _mel_blocks(task: ShardTask, result: ShardResult) -> dict[str, tuple[int, int, int]]:
    """(offset, length, checksum) of each sample's Whisper features by key; adds findings on the file."""
    assert task.mel_entry is not None
    path = task.folder / task.mel_entry["name"]
    if not path.is_file():
        result.findings.append(Finding("missing_file", "the manifest names it", path.name))
        result.whole = False
        return {}
    with mapped_file(path) as view:
        if wrong := check_file(view, task.mel_entry, task.others):
            result.findings.append(wrong)
            result.whole = False
            if wrong.kind == "swapped_file":
                return {}
        members, damage = walk(view, path.name)
        known = set()
        for entry in task.rows if task.rows is not None else ():
            offset, length = int(entry["mel_offset"]), int(entry["mel_length"])
            block = bytes(view[offset : offset + length])
            if length and (len(block) < length or checksum(block) != entry["mel_xxh3"]):
                key = entry["key"].decode()
                known.add(key)
                result.findings.append(
                    Finding("damaged_features", describe_damage(block, decode_mels), path.name, key, offset)
                )
        result.findings += [one for one in damage if one.key not in known]
        blocks = {}
        for member in members:
            block = bytes(view[member.offset : member.end])
            blocks[member.name.removesuffix(f".{MEL}")] = (member.offset, len(block), checksum(block))
        return blocks


def _check_mel(task: ShardTask, sample: Sample, mel: tuple[int, int, int]) -> Iterator[Finding]:
    """Decompress a sample's Whisper features and compare their frames with its metadata."""
    assert task.mel_entry is not None
    name = task.mel_entry["name"]
    with mapped_file(task.folder / name) as view:
        block = bytes(view[mel[0] : mel[0] + mel[1]])
    try:
        _, arrays = decode_mels(block, name)
    except ShardError as error:
        yield Finding("damaged_features", str(error), name, sample.key, mel[0])
        return
    expected = [frames for frames in sample.mel_frames if frames]
    if [array.shape[1] for array in arrays] != expected:
        got = [array.shape[1] for array in arrays]
        yield Finding("wrong_features", f"expected {expected} frames, got {got}", name, sample.key, mel[0])
    if any(not np.isfinite(array).all() for array in arrays):
        yield Finding("wrong_features", "values are NaN or infinite", name, sample.key, mel[0])
