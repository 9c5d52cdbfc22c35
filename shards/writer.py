"""Writing a shard set: shard files first, each whole or absent, then the index, then the manifest that makes it valid.

In: the samples of one shard after another, in their final order; any process may write any shard. Out:
`codes-NNNNNN.tar`, with Whisper features `mel-NNNNNN.tar`, then `index.npy`, `rejects.jsonl`, `manifest.json`.
Never: a half-written file under a final name; a manifest before everything it names is in place; a result that
depends on who wrote which shard, or on how often the writing was killed and started again.

What a shard adds to index and rejects is committed in `.work/shard-NNNNNN.npz` after the shard has its name, so a
restart writes only what is not committed. A remote set is built in a local staging folder; each shard is uploaded
whole, and only then committed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Iterable
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
from higgs_tune.shards.remote import Target
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.shards.split import ValidationSplit
from higgs_tune.shards.ustar import tar_end

MANIFEST, INDEX, REJECTS = "manifest.json", "index.npy", "rejects.jsonl"
WORK = ".work"


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of one shard file."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class Committed:
    """What one shard adds to the set.

    files: its codes file, then its mel file if the set has one. rows: its index rows, `speaker` left 0, in order.
    speakers: the speaker of each row. rejects: one dict a sample left out.
    """

    files: list[ShardInfo]
    rows: np.ndarray
    speakers: list[str]
    rejects: list[dict[str, Any]]


@dataclass
class _TarFile:
    """One shard file while it is written."""

    file: BinaryIO
    size: int = 0
    members: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)

    def add(self, block: bytes) -> tuple[int, int, int]:
        """Append a sample's members; returns offset, length and checksum as the index holds them."""
        at = self.size
        self._write(block)
        self.members += 1
        return at, len(block), checksum(block)

    def close(self, path: Path) -> ShardInfo:
        """End the archive, and compare what can be read back with what was written."""
        self._write(tar_end(self.size))
        self.file.flush()
        got, expected = file_sha256(Path(self.file.name)), self.sha256.hexdigest()
        if got != expected:
            raise ShardError("what was read back differs from what was written", where=path, expected=expected, got=got)
        return ShardInfo(path.name, self.size, expected, self.members)

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.size += len(data)


def shard_name(number: int, kind: str = "codes") -> str:
    return f"{kind}-{number:06d}.tar"


class SetWriter:
    """Writes the shards of one set, commits them, and finishes the set. Cheap to pickle.

    Args:
        folder: a local folder; for a remote set, its staging folder.
        ids: special ids of the checkpoint that the tokens are for.
        split: which samples are held out.
        features: Whisper features that the samples carry: `none`, `mel` or `encoder`.
        url: where the set goes, for a remote set (any fsspec URL).
    """

    def __init__(
        self, folder: Path, ids: SpecialIds, split: ValidationSplit, *, features: str = "none", url: str | None = None
    ) -> None:
        self.folder, self.ids, self.split, self.features = folder, ids, split, features
        self.target = Target(url) if url else None

    def begin(self, predicted_bytes: int = 0) -> None:
        """Make the folder, remove what a killed run left, and check that the set can be written.

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
            rejects: may be filled while `samples` is drawn from; what it holds at the end is committed.

        Raises:
            UserError: the folder cannot be written, or the disk is full; nothing stands under a final name.
            ShardError: what was read back differs from what was written.
        """
        kinds = ["codes"] if self.features == "none" else ["codes", "mel"]
        paths = [self.folder / shard_name(number, kind) for kind in kinds]
        rows, speakers = [], []
        with contextlib.ExitStack() as stack:
            tars = [_TarFile(stack.enter_context(durable.atomic_file(path))) for path in paths]
            for sample in samples:
                rows.append(self._write_sample(sample, number, tars))
                speakers.append(str(sample.meta.get("speaker") or ""))
            files = [tar.close(path) for tar, path in zip(tars, paths, strict=True)]
        committed = Committed(files, np.array(rows, index_dtype(MAX_KEY_CHARS)), speakers, rejects)
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
        notes |= {"speakers": committed.speakers, "rejects": committed.rejects}
        np.savez(buffer, rows=committed.rows, notes=np.frombuffer(durable.to_json(notes), np.uint8))
        durable.write_bytes(self._note(number), buffer.getvalue())
        if self.target:
            for path in paths:
                path.unlink()

    def committed(self, number: int) -> Committed | None:
        """What a shard adds to the set; None where it is not committed, or its files are not those of the commit."""
        note = self._note(number)
        if not note.is_file():
            return None
        with np.load(note, allow_pickle=False) as stored:
            notes, rows = json.loads(stored["notes"].tobytes()), stored["rows"]
        files = [ShardInfo(**file) for file in notes["files"]]
        if any(self._size(file.name) != file.bytes for file in files):
            return None
        return Committed(files, rows, notes["speakers"], notes["rejects"])

    def _note(self, number: int) -> Path:
        return self.folder / WORK / f"shard-{number:06d}.npz"

    def _size(self, name: str) -> int | None:
        if self.target:
            return self.target.size(name)
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None

    def finish(self, shards: int, provenance: dict[str, Any]) -> dict[str, Any]:
        """Write index, rejects and, last, the manifest; then remove the work folder, or all that was staged.

        Args:
            shards: their number; all must be committed.
            provenance: what made codes and tokens; a trainer compares it with its checkpoint.

        Returns:
            The manifest.
        """
        parts = [self.committed(number) for number in range(shards)]
        done = [part for part in parts if part is not None]
        if len(done) != shards:
            raise ShardError("shards are not committed", where=self.folder, expected=shards, got=len(done))
        durable.remove_leftovers(self.folder)  # of workers that died and were replaced
        index, names = join_index([part.rows for part in done], [part.speakers for part in done])
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
            "speakers": names,
            "provenance": provenance,
        }
        self._put(MANIFEST, durable.to_json(manifest, indent=1) + b"\n")
        self.clear()
        return manifest

    def discard(self, shards: Iterable[Committed]) -> None:
        """Remove the files of these shards and the work folder: the set is not to be finished."""
        for name in (file.name for shard in shards for file in shard.files):
            if self.target:
                self.target.remove(name)
            (self.folder / name).unlink(missing_ok=True)
        self.clear()

    def clear(self) -> None:
        """Remove the work folder, or all that was staged, of a finished set; another run may be at the same."""
        shutil.rmtree(self.folder / WORK, ignore_errors=True)
        if self.target:
            for name in (MANIFEST, INDEX, REJECTS):
                (self.folder / name).unlink(missing_ok=True)

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
