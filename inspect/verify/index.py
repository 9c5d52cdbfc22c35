"""Verification of the index, the totals and the rejects of a set.

In: the files, and the index rows computed from the shards. Out: findings. Rows of damaged samples are not compared:
the damage is a finding of its own.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from higgs_tune.inspect.verify.diagnose import Finding
from higgs_tune.inspect.verify.manifest import Manifest
from higgs_tune.inspect.verify.shard import ShardResult
from higgs_tune.shards.index import index_dtype, join_index, totals
from higgs_tune.shards.writer import count_reasons

MOST_ROWS = 20  # wrong rows that get a finding each


@dataclass
class IndexFile:
    """The index file as it was read. rows: None where it cannot be read. trusted: its SHA-256 is the manifest's."""

    name: str
    rows: np.ndarray | None = None
    trusted: bool = False
    findings: list[Finding] = field(default_factory=list)


def read_index(folder: Path, manifest: Manifest) -> IndexFile:
    """Read the index and compare it with its entry in the manifest."""
    entry = manifest.content["index"]
    index = IndexFile(entry["name"])
    path = folder / index.name
    if not path.is_file():
        index.findings.append(Finding("missing_file", "the manifest names it", index.name))
        return index
    data = path.read_bytes()
    got = hashlib.sha256(data).hexdigest()
    index.trusted = got == entry["sha256"]
    try:
        rows = np.load(io.BytesIO(data), allow_pickle=False)
        index.rows = rows if rows.dtype.names and rows.dtype == index_dtype(rows.dtype["key"].itemsize) else None
        problem = "" if index.rows is not None else "not the fields of an index"
    except (ValueError, EOFError, OSError, KeyError) as error:
        problem = str(error)
    if problem:
        index.findings.append(Finding("damaged_index", f"cannot be read: {problem}", index.name))
    elif not index.trusted:
        detail = f"expected {entry['bytes']} bytes, sha256 {entry['sha256']}, got {len(data)} bytes, sha256 {got}"
        index.findings.append(Finding("stale_index", detail, index.name))
    elif index.rows is not None:
        index.findings += _compare_with_entry(index.rows, entry)
    return index


def _compare_with_entry(rows: np.ndarray, entry: dict[str, Any]) -> Iterator[Finding]:
    if len(rows) != entry["rows"]:
        yield Finding("wrong_count", f"expected {entry['rows']} rows, got {len(rows)}", entry["name"])
    digest = xxhash.xxh3_64_hexdigest(rows.view(np.uint8).data)
    if digest != entry["xxh3"]:
        yield Finding("wrong_manifest", f"xxh3 of the index: expected {digest}, got {entry['xxh3']}", "manifest.json")


def compare_with_shards(index: IndexFile, results: list[ShardResult], manifest: Manifest) -> list[Finding]:
    """Compare the rows of the index with the rows computed from the intact samples of the shards."""
    findings = list(_duplicates(results, manifest))
    if index.rows is None or findings:
        return findings
    made, names = join_index([result.array() for result in results], [result.speakers for result in results])
    made["split"] = manifest.expected_split(made, names, index.rows["key"])
    listed = manifest.content["speakers"]
    if names != listed and len(made) == len(index.rows):
        detail = f"speakers: expected {len(names)}, {names[:5]}, got {len(listed)}, {listed[:5]}"
        findings.append(Finding("wrong_manifest", detail, "manifest.json"))
    places = _places(index.rows, made)
    rows, made = index.rows[places[places >= 0]], made[places >= 0]
    differing = [name for name in made.dtype.names or () if name not in ("key", "speaker", "split")]
    differing += ["split"] if manifest.split else []
    wrong = np.flatnonzero(np.logical_or.reduce([rows[name] != made[name] for name in differing]))
    if not index.trusted:
        detail = f"{len(rows) - len(wrong)} of its {len(index.rows)} rows fit the {len(places)} samples of the shards"
        return [*findings, Finding("stale_index", detail, index.name)]
    findings += _wrong_rows(index, rows, made, wrong, differing)
    findings += _wrong_speakers(index, rows, made, names, listed)
    if (np.diff(places[places >= 0]) <= 0).any():
        findings.append(Finding("wrong_order", "the rows are not in the order of the shards", index.name))
    return findings


def _places(rows: np.ndarray, made: np.ndarray) -> np.ndarray:
    """int64 [made]: position of each row's key in the index; -1 where it is not there."""
    if not len(rows):
        return np.full(len(made), -1)
    order = np.argsort(rows["key"], kind="stable")
    places = order[np.minimum(np.searchsorted(rows["key"], made["key"], sorter=order), len(rows) - 1)]
    return np.where(rows["key"][places] == made["key"], places, -1)


def _duplicates(results: list[ShardResult], manifest: Manifest) -> Iterator[Finding]:
    seen: dict[bytes, str] = {}
    for result, entry in zip(results, manifest.shards, strict=True):
        for row in result.rows:
            if row[0] in seen:
                detail = f"the key is also in {seen[row[0]]}"
                yield Finding("duplicate_key", detail, entry["name"], row[0].decode(), row[2])
            seen[row[0]] = entry["name"]


def _wrong_rows(
    index: IndexFile, rows: np.ndarray, made: np.ndarray, wrong: np.ndarray, names: list[str]
) -> Iterator[Finding]:
    for row in wrong[:MOST_ROWS].tolist():
        pairs = [(name, made[name][row], rows[name][row]) for name in names]
        detail = "; ".join(f"{name}: expected {want}, got {got}" for name, want, got in pairs if want != got)
        yield Finding("wrong_index_row", detail, index.name, made["key"].tolist()[row].decode())
    if len(wrong) > MOST_ROWS:
        yield Finding("wrong_index_row", f"and {len(wrong) - MOST_ROWS} more rows", index.name)


def _wrong_speakers(
    index: IndexFile, rows: np.ndarray, made: np.ndarray, names: list[str], listed: list[str]
) -> Iterator[Finding]:
    """The first speaker that differs. Speakers are compared by name: their numbers depend on the other samples."""
    for key, number, own in zip(made["key"].tolist(), rows["speaker"].tolist(), made["speaker"].tolist(), strict=True):
        got = listed[number] if number < len(listed) else f"number {number} of {len(listed)}"
        if got != names[own]:
            detail = f"speaker: expected {names[own]!r}, got {got!r}"
            yield Finding("wrong_index_row", detail, index.name, key.decode())
            return


def check_totals(index: IndexFile, manifest: Manifest) -> list[Finding]:
    """Compare the manifest's totals with the index."""
    if index.rows is None or not index.trusted:
        return []
    expected, got = totals(index.rows), manifest.content["totals"]
    wrong = [
        f"{name}: expected {value}, got {got.get(name)}" for name, value in expected.items() if got.get(name) != value
    ]
    return [Finding("wrong_manifest", f"totals: {'; '.join(wrong)}", "manifest.json")] if wrong else []


def check_rejects(folder: Path, manifest: Manifest) -> list[Finding]:
    """Compare rejects.jsonl with the manifest."""
    entry = manifest.content["rejects"]
    path = folder / entry["name"]
    if not path.is_file():
        return [Finding("missing_file", "the manifest names it", path.name)]
    data = path.read_bytes()
    got = hashlib.sha256(data).hexdigest()
    if got != entry["sha256"]:
        detail = f"expected {entry['bytes']} bytes, sha256 {entry['sha256']}, got {len(data)} bytes, sha256 {got}"
        return [Finding("wrong_sha256", detail, path.name)]
    try:
        rejects = [json.loads(line) for line in data.splitlines()]
        reasons = count_reasons(rejects)
    except (ValueError, KeyError, TypeError) as error:
        return [Finding("damaged_rejects", f"a line cannot be read: {error}", path.name)]
    if len(rejects) != entry["rows"] or reasons != entry["by_reason"]:
        detail = f"rejects: expected {len(rejects)}, {reasons}, got {entry['rows']}, {entry['by_reason']}"
        return [Finding("wrong_manifest", detail, "manifest.json")]
    return []
