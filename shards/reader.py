"""Reading a shard set by row number: one read at an offset, one checksum, one sample.

In: the folder or fsspec URL of a set. Out: verified samples.

Guarantees:
    Damage to a set's files is an error that names file, key and offset (tests/test_damage.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from higgs_tune.shards.errors import ShardError, UserError
from higgs_tune.shards.format import (
    FORMAT_VERSION,
    Arrays,
    Sample,
    checksum,
    decode_arrays,
    decode_mels,
    decode_sample,
    mels_fit,
)
from higgs_tune.shards.index import SPLIT_VAL, index_dtype
from higgs_tune.shards.manifest import MANIFEST, manifest_fault
from higgs_tune.shards.remote import Cache, Source
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.shards.split import ValidationSplit

OPEN_FILES = 128  # shard files that a process keeps open


def read_manifest(source: Source) -> tuple[dict[str, Any], str]:
    """A set's manifest, and the SHA-256 of its bytes; no other file of the set is needed.

    Raises:
        UserError: there is none, or it has another format version.
        ShardError: it is damaged.
    """
    where = f"{source.location}/{MANIFEST}"
    try:
        data = source.read(MANIFEST)
        manifest = json.loads(data)
    except (FileNotFoundError, NotADirectoryError):
        hint = "A folder without one is not a finished shard set: run higgs-preprocess, or wait until it is done."
        raise UserError("no shard set here", where=source.location, expected=MANIFEST, hint=hint) from None
    except ValueError as error:
        raise ShardError(f"the manifest is not JSON: {error}", where=where) from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError("unknown format version", where=where, expected=FORMAT_VERSION, got=version)
    if fault := manifest_fault(manifest):
        raise ShardError(f"the manifest is damaged: {fault}", where=where)
    return manifest, hashlib.sha256(data).hexdigest()


class ShardSet:
    """A finished shard set, open for reading. Cheap to pickle; shards are opened on first use.

    Args:
        location: the folder or URL of `manifest.json`.
        cache: keeps downloaded files; by default `Cache.default()`.

    Raises:
        UserError: there is no manifest, or it has another format version.
        ShardError: the manifest is damaged, or a local file is missing or has another size.
    """

    def __init__(self, location: str | Path, cache: Cache | None = None) -> None:
        self.source = Source(location, cache)
        self.manifest, self.manifest_hash = read_manifest(self.source)
        self._check_files()
        self._files: OrderedDict[str, int] = OrderedDict()
        self._held_out: np.ndarray | None = None

    def __reduce__(self) -> tuple[type[ShardSet], tuple[str, Cache]]:
        return (type(self), (self.source.location, self.source.cache))

    def __len__(self) -> int:
        return self.manifest["index"]["rows"]

    @property
    def location(self) -> str:
        """The folder or URL."""
        return self.source.location

    @property
    def folder(self) -> Path:
        """The folder of a local set.

        Raises:
            UserError: the set is remote.
        """
        if self.source.remote:
            raise UserError("this works on a local folder only", where=self.location)
        return Path(self.location)

    def _check_files(self) -> None:
        """Check existence and size of every local file that the manifest names."""
        if self.source.remote:
            return
        manifest = self.manifest
        for entry in [*manifest["shards"], *manifest["mel_shards"], manifest["index"]]:
            path = Path(self.location) / entry["name"]
            if not path.is_file():
                raise ShardError("a file of the set is missing", where=path)
            if path.stat().st_size != entry["bytes"]:
                got = path.stat().st_size
                raise ShardError("a file has a wrong size", where=path, expected=f"{entry['bytes']} bytes", got=got)

    @cached_property
    def index(self) -> np.ndarray:
        """The index rows, memory-mapped, read-only.

        Raises:
            ShardError: the file cannot be read, or its checksum is not the manifest's.
        """
        entry = self.manifest["index"]
        path = self.fetch(entry)
        try:
            index = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ShardError(f"cannot read the index: {error}", where=path) from error
        digest = xxhash.xxh3_64_hexdigest(index.view(np.uint8).data)
        if digest != entry["xxh3"] or index.dtype != index_dtype(index.dtype["key"].itemsize):
            raise ShardError(
                "the index is not the manifest's", where=path, expected=f"xxh3 {entry['xxh3']}", got=digest
            )
        if len(index) != entry["rows"] or (len(index) and index["speaker"].max() >= len(self.manifest["speakers"])):
            expected = f"{entry['rows']} rows and {len(self.manifest['speakers'])} speakers"
            raise ShardError("the index does not fit the manifest", where=path, expected=expected, got=len(index))
        return index.view(np.ndarray)  # the same memory, without the cost of np.memmap at each access

    @property
    def provenance(self) -> dict[str, Any]:
        return self.manifest["provenance"]

    @property
    def features(self) -> str:
        """Whisper features that the samples carry: `none`, `mel` or `encoder`."""
        return self.provenance.get("features", {}).get("whisper", "none")

    @cached_property
    def special_ids(self) -> SpecialIds:
        """Special ids of the checkpoint that the set was made for.

        Raises:
            ShardError: the provenance names no model.
        """
        if "model" not in self.provenance:
            raise ShardError("the provenance names no model", where=f"{self.location}/{MANIFEST}")
        return SpecialIds(**self.provenance["model"]["special_ids"])

    def rows_of(self, *, validation: bool) -> np.ndarray:
        """Row numbers of the validation or the training split; int64, ascending."""
        held_out = self.index["split"] == SPLIT_VAL if self._held_out is None else self._held_out
        return np.flatnonzero(held_out == validation)

    def hold_out(self, split: ValidationSplit) -> None:
        """Split the set anew, in place of the split that it was made with.

        Raises:
            UserError: by speaker, and the set names fewer than two.
        """
        if split.by == "sample":
            self._held_out = split.held_out([key.decode() for key in self.index["key"]])
            return
        speakers = self.manifest["speakers"]
        if len(speakers) < 2:
            got, hint = ", ".join(filter(None, speakers)) or "no names", "--val_by sample needs no speaker names."
            raise UserError(
                "--val_by speaker: too few speakers", where=self.location, expected="2 names", got=got, hint=hint
            )
        self._held_out = split.held_out([name or "None" for name in speakers])[self.index["speaker"]]

    def row_of(self, key: str) -> int:
        """Row number of a key; a string of digits that is no key is a row number itself.

        Raises:
            UserError: neither a key of the set nor a row number.
        """
        rows = np.flatnonzero(self.index["key"] == key.encode())
        if len(rows):
            return int(rows[0])
        if key.isdecimal() and int(key) < len(self):
            return int(key)
        raise UserError("no such sample", where=self.location, expected=f"a key, or 0 to {len(self) - 1}", got=key)

    def read(self, row: int, *, mels: bool = False) -> Sample:
        """Read and verify one sample.

        Args:
            mels: read its Whisper features too.

        Raises:
            ShardError: the shard is missing or cut, a checksum is wrong, or the key is not the index's.
        """
        entry = self.index[row]
        key = entry["key"].decode()
        block, where = self._block(entry, "shards", "offset", "length", "xxh3")
        sample = decode_sample(block, where)
        if sample.key != key:
            raise ShardError("the index names another sample", where=where, expected=key, got=sample.key)
        if not mels or not entry["mel_length"]:
            return sample
        block, where = self._block(entry, "mel_shards", "mel_offset", "mel_length", "mel_xxh3")
        mel_key, arrays = decode_mels(block, where)
        if mel_key != key or not mels_fit(arrays, sample.mel_frames):
            expected = f"{key} with {sample.mel_frames} frames"
            got = f"{mel_key} with {[mel.shape[1] for mel in arrays]}"
            raise ShardError("the Whisper features are not the sample's", where=where, expected=expected, got=got)
        return Sample(sample.key, sample.meta, sample.tokens_2L, sample.codes_KT, arrays)

    def read_arrays(self, rows: Sequence[int]) -> Iterator[Arrays | ShardError]:
        """Read and verify samples without their metadata, in the given order; yields the error of a damaged one."""
        entries = self.index[list(rows)]
        columns = (entries[name].tolist() for name in ("key", "shard", "offset", "length", "xxh3"))
        for row, key, shard, offset, length, digest in zip(rows, *columns, strict=True):
            try:
                block = os.pread(self._open(self.manifest["shards"][shard]), length, offset)
                if len(block) != length or checksum(block) != digest:
                    self.read(row)  # raises the error
                arrays = decode_arrays(block, key)
                if arrays.key != key.decode():
                    self.read(row)
            except ShardError as error:
                yield error
            else:
                yield arrays

    def _block(self, entry: Any, files: str, at: str, size: str, digest: str) -> tuple[bytes, str]:
        """The bytes of a sample's members in a shard, and their place for error messages."""
        file = self.manifest[files][int(entry["shard"])]
        offset, length = int(entry[at]), int(entry[size])
        where = f"{self.location}/{file['name']}, key {entry['key'].decode()}, offset {offset}"
        block = os.pread(self._open(file), length, offset)
        if len(block) != length:
            raise ShardError("the shard ends early", where=where, expected=f"{length} bytes", got=f"{len(block)} bytes")
        if checksum(block) != entry[digest]:
            expected, got = f"xxh3 {int(entry[digest]):016x}", f"{checksum(block):016x}"
            raise ShardError("damaged sample: wrong checksum", where=where, expected=expected, got=got)
        return block, where

    def fetch(self, entry: dict[str, Any]) -> Path:
        """Local path of a file that the manifest names."""
        names = {"size": entry["bytes"], "sha256": entry["sha256"]}
        return self.source.fetch(entry["name"], set_hash=self.manifest_hash, **names)

    def _open(self, entry: dict[str, Any]) -> int:
        """File descriptor of a shard; beyond `OPEN_FILES`, the least recently used one is closed."""
        name = entry["name"]
        if name not in self._files:
            path = self.fetch(entry)
            try:
                self._files[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise ShardError(f"cannot open a shard: {error.strerror}", where=path) from error
            if len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(name)
        return self._files[name]

    def close(self) -> None:
        """Close the open shards."""
        while self._files:
            os.close(self._files.popitem()[1])
