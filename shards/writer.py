"""Writing a shard set: first the shards, then the index, last the manifest that makes the set valid.

In: the samples of each shard, in their final order; any process may write any shard. Out: `codes-NNNNNN.tar`, with
Whisper features `mel-NNNNNN.tar`, then `index.npy`, `rejects.jsonl`, `manifest.json`.

Guarantees (tests/test_writer.py):
    A file under its final name is whole, and a manifest names only files that are in place.
    The bytes do not depend on which process wrote which shard, or on how often writing was killed and restarted.

When a shard has its final name, its index rows and rejects are committed to `.work/shard-NNNNNN.npz`; a restart writes
only shards that are not committed. A remote set is built in a local staging folder; a shard is uploaded, then
committed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from higgs_tune.shards import durable
from higgs_tune.shards.errors import ShardError
from higgs_tune.shards.format import (
    FORMAT_VERSION,
    MAX_KEY_CHARS,
    Sample,
    checksum,
    encode_mels,
    encode_sample,
)
from higgs_tune.shards.index import index_counts, index_dtype, join_index, npy_bytes, totals
from higgs_tune.shards.layout import LAYOUTS, layout_of
from higgs_tune.shards.manifest import MANIFEST
from higgs_tune.shards.remote import Target
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.shards.split import ValidationSplit
from higgs_tune.shards.ustar import tar_end

INDEX, REJECTS = "index.npy", "rejects.jsonl"
WORK = ".work"


@dataclass(frozen=True)
class ShardInfo:
    """The manifest's entry of one shard file."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class Committed:
    """A shard that is written, with its part of index and rejects.

    Attributes:
        files: its codes file, then its mel file if the set has one.
        rows: its index rows, in order; `speaker` is still 0.
        speakers: the speaker's name of each row.
        rejects: one dict for each sample that was left out.
        layouts: number of samples by prompt layout.
    """

    files: list[ShardInfo]
    rows: np.ndarray
    speakers: list[str]
    rejects: list[dict[str, Any]]
    layouts: dict[str, int]


@dataclass
class _TarFile:
    """A shard file that is being written."""

    file: BinaryIO
    size: int = 0
    members: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)

    def add(self, block: bytes) -> tuple[int, int, int]:
        """Append a sample's members; returns their offset, length and checksum for the index."""
        at = self.size
        self._write(block)
        self.members += 1
        return at, len(block), checksum(block)

    def close(self, path: Path) -> ShardInfo:
        """End the archive, read it back, and compare its SHA-256."""
        self._write(tar_end(self.size))
        self.file.flush()
        got, expected = file_sha256(Path(self.file.name)), self.sha256.hexdigest()
        if got != expected:
            raise ShardError("the file read back is not the one written", where=path, expected=expected, got=got)
        return ShardInfo(path.name, self.size, expected, self.members)

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)


def shard_name(number: int, kind: str = "codes") -> str:
    return f"{kind}-{number:06d}.tar"


class SetWriter:
    """Writes and commits the shards of a set, then finishes the set. Cheap to pickle.

    Args:
        folder: a local folder; for a remote set, its staging folder.
        ids: special ids of the checkpoint that the tokens are for.
        split: the validation split.
        features: the samples' Whisper features: `none`, `mel` or `encoder`.
        url: of a remote set (any fsspec URL).
    """

    def __init__(
        self, folder: Path, ids: SpecialIds, split: ValidationSplit, *, features: str = "none", url: str | None = None
    ) -> None:
        self.folder, self.ids, self.split, self.features = folder, ids, split, features
        self.target = Target(url) if url else None

    def begin(self, predicted_bytes: int = 0) -> None:
        """Make the folder, delete the temporary files of a killed run, and check that the set can be written.

        Raises:
            UserError: the folder cannot be made or written, or has less free space than predicted.
        """
        durable.check_writable(self.folder / WORK, predicted_bytes)
        durable.remove_leftovers(self.folder)
        durable.remove_leftovers(self.folder / WORK)
        if self.target:
            self.target.check_writable()

    def write(self, number: int, samples: Iterable[Sample], rejects: list[dict[str, Any]]) -> Committed:
        """Write and commit one shard.

        Args:
            rejects: committed with the shard; may be filled while `samples` is iterated.

        Raises:
            UserError: the folder cannot be written, or the disk is full; no file has its final name.
            ShardError: the file read back is not the one written.
        """
        kinds = ["codes"] if self.features == "none" else ["codes", "mel"]
        paths = [self.folder / shard_name(number, kind) for kind in kinds]
        rows, speakers, layouts = [], [], dict.fromkeys(LAYOUTS, 0)
        with contextlib.ExitStack() as stack:
            tars = [_TarFile(stack.enter_context(durable.atomic_file(path))) for path in paths]
            for sample in samples:
                rows.append(self._write_sample(sample, number, tars))
                speakers.append(str(sample.meta.get("speaker") or ""))
                layouts[layout_of(sample.meta.get("messages") or ())] += 1
            files = [tar.close(path) for tar, path in zip(tars, paths, strict=True)]
        committed = Committed(files, np.array(rows, index_dtype(MAX_KEY_CHARS)), speakers, rejects, layouts)
        self._commit(number, committed, paths)
        return committed

    def _write_sample(self, sample: Sample, shard: int, tars: list[_TarFile]) -> tuple[Any, ...]:
        """Append a sample to the shard's files; returns its index row."""
        codes = tars[0].add(encode_sample(sample))
        mel = tars[1].add(encode_mels(sample)) if sample.mels else (0, 0, 0)
        counts = index_counts(sample, self.ids, self.features)
        return (sample.key.encode(), shard, *codes, *mel, *counts, 0, self.split.of(sample))

    def _commit(self, number: int, committed: Committed, paths: list[Path]) -> None:
        if self.target:
            for path in paths:
                self.target.upload(path)
        buffer = io.BytesIO()
        notes = {"files": [asdict(file) for file in committed.files]}
        notes |= {"speakers": committed.speakers, "rejects": committed.rejects, "layouts": committed.layouts}
        np.savez(buffer, rows=committed.rows, notes=np.frombuffer(durable.to_json(notes), np.uint8))
        durable.write_bytes(self._note(number), buffer.getvalue())
        if self.target:
            for path in paths:
                path.unlink()

    def committed(self, number: int) -> Committed | None:
        """A shard's commit; None without one, or if its files have other sizes or it counts no layouts."""
        note = self._note(number)
        if not note.is_file():
            return None
        with np.load(note, allow_pickle=False) as stored:
            notes, rows = json.loads(stored["notes"].tobytes()), stored["rows"]
        files = [ShardInfo(**file) for file in notes["files"]]
        if any(self._size(file.name) != file.bytes for file in files) or "layouts" not in notes:
            return None
        return Committed(files, rows, notes["speakers"], notes["rejects"], notes["layouts"])

    def _note(self, number: int) -> Path:
        return self.folder / WORK / f"shard-{number:06d}.npz"

    def _size(self, name: str) -> int | None:
        if self.target:
            return self.target.size(name)
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None

    def finish(self, shards: int, provenance: dict[str, Any]) -> dict[str, Any]:
        """Write index, rejects and, last, the manifest; then delete the work folder and staged files.

        Args:
            shards: number of shards; all must be committed.
            provenance: models and options that made codes and tokens; the trainer compares it with its checkpoint.

        Returns:
            The manifest.

        Raises:
            ShardError: a shard is not committed.
        """
        parts = [self.committed(number) for number in range(shards)]
        done = [part for part in parts if part is not None]
        if len(done) != shards:
            raise ShardError("shards are not committed", where=self.folder, expected=shards, got=len(done))
        durable.remove_leftovers(self.folder)  # temporary files of workers that died and were replaced
        index, names = self.joined(done)
        rejects = [reject for part in done for reject in part.rejects]
        self._put(INDEX, npy_bytes(index))
        self._put(REJECTS, b"".join(durable.to_json(reject) + b"\n" for reject in rejects))
        digest = xxhash.xxh3_64_hexdigest(index.view(np.uint8).data)
        manifest = {
            "format_version": FORMAT_VERSION,
            "shards": [asdict(part.files[0]) for part in done],
            "mel_shards": [asdict(part.files[1]) for part in done if len(part.files) > 1],
            "index": self._entry(INDEX) | {"rows": len(index), "xxh3": digest},
            "rejects": self._entry(REJECTS) | {"rows": len(rejects), "by_reason": count_reasons(rejects)},
            "totals": totals(index),
            "layouts": {name: sum(part.layouts[name] for part in done) for name in LAYOUTS},
            "speakers": names,
            "provenance": provenance,
        }
        self._put(MANIFEST, durable.to_json(manifest, indent=1) + b"\n")
        self.clear()
        return manifest

    def discard(self, shards: Iterable[Committed]) -> None:
        """Give the set up: delete the files of these shards, and the work folder."""
        for name in (file.name for shard in shards for file in shard.files):
            if self.target:
                self.target.remove(name)
            (self.folder / name).unlink(missing_ok=True)
        self.clear()

    def clear(self) -> None:
        """Delete the work folder and staged files of a finished set; another run may be deleting them too."""
        shutil.rmtree(self.folder / WORK, ignore_errors=True)
        if self.target:
            for name in (MANIFEST, INDEX, REJECTS):
                (self.folder / name).unlink(missing_ok=True)

    def joined(self, shards: Sequence[Committed]) -> tuple[np.ndarray, list[str]]:
        """The index rows of all shards with the set's split, and the speakers' names by number."""
        index, names = join_index([shard.rows for shard in shards], [shard.speakers for shard in shards])
        self.split.settle(index, names)
        return index, names

    def _put(self, name: str, data: bytes) -> None:
        durable.write_bytes(self.folder / name, data)
        if self.target:
            self.target.upload(self.folder / name)

    def _entry(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return {"name": name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def count_reasons(rejects: list[dict[str, Any]]) -> dict[str, int]:
    """Number of rejects by reason."""
    counts: dict[str, int] = {}
    for reject in rejects:
        counts[reject["reason"]] = counts.get(reject["reason"], 0) + 1
    return counts
