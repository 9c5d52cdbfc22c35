"""Reading a shard set by row number: one positioned read, one checksum, one sample.

In: the folder that `manifest.json` stands in. Out: samples, verified. Never: a silent skip, a pickle, a guess.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ShardError, UserError
from .format import FORMAT_VERSION, SPLIT_VAL, Sample, checksum, decode_sample, index_dtype
from .sequence import SpecialIds
from .writer import INDEX, MANIFEST


class ShardSet:
    """A finished shard set, open for reading. Cheap to pickle; files are opened where they are first read.

    Args:
        folder: the folder of `manifest.json`.

    Raises:
        UserError: there is no manifest, or it is of another format version.
        ShardError: manifest and index disagree.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest, self.manifest_hash = self._read_manifest()
        self._files: dict[int, int] = {}

    def __reduce__(self) -> tuple[type[ShardSet], tuple[Path]]:
        return (type(self), (self.folder,))

    def __len__(self) -> int:
        return len(self.index)

    def _read_manifest(self) -> tuple[dict[str, Any], str]:
        path = self.folder / MANIFEST
        try:
            data = path.read_bytes()
            manifest = json.loads(data)
        except (FileNotFoundError, NotADirectoryError):
            hint = "A folder without one is not a finished shard set: run higgs-preprocess, or wait until it is done."
            raise UserError("no shard set here", where=self.folder, expected=MANIFEST, hint=hint) from None
        except ValueError as error:
            raise ShardError(f"the manifest is not JSON: {error}", where=path) from error
        version = manifest.get("format_version") if isinstance(manifest, dict) else None
        if version != FORMAT_VERSION:
            raise UserError("unknown format version", where=path, expected=FORMAT_VERSION, got=version)
        return manifest, hashlib.sha256(data).hexdigest()

    @cached_property
    def index(self) -> np.ndarray:
        """The index rows, mapped from the file, read-only."""
        path = self.folder / INDEX
        try:
            index = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ShardError(f"cannot read the index: {error}", where=path) from error
        expected = index_dtype(index.dtype["key"].itemsize if index.dtype.names else 1)
        if index.dtype != expected or len(index) != self.manifest["index"]["rows"]:
            raise ShardError(
                "the index is not the manifest's",
                where=path,
                expected=f"{self.manifest['index']['rows']} rows of format {FORMAT_VERSION}",
                got=f"{len(index)} rows of {len(index.dtype.names or ())} fields",
            )
        return index

    @property
    def provenance(self) -> dict[str, Any]:
        return self.manifest["provenance"]

    @cached_property
    def special_ids(self) -> SpecialIds:
        """The checkpoint's special ids that the set was made with."""
        return SpecialIds(**self.provenance["model"]["special_ids"])

    def rows_of(self, *, validation: bool) -> np.ndarray:
        """Row numbers of the held-out split, or of the rest; int64, ascending."""
        return np.flatnonzero((self.index["split"] == SPLIT_VAL) == validation)

    def row_of(self, key: str) -> int:
        """Row number of a key, or of a number that stands for itself.

        Raises:
            UserError: neither a key of the set nor a row number.
        """
        found = np.flatnonzero(self.index["key"] == key.encode())
        if len(found):
            return int(found[0])
        if key.isdecimal() and int(key) < len(self):
            return int(key)
        raise UserError("no such sample", where=self.folder, expected=f"a key, or 0 to {len(self) - 1}", got=key)

    def read(self, row: int) -> Sample:
        """Read and verify one sample.

        Raises:
            ShardError: the shard is missing or cut, the checksum is wrong, or the key is not the index's.
        """
        entry = self.index[row]
        key, number = entry["key"].decode(), int(entry["shard"])
        offset, length = int(entry["offset"]), int(entry["length"])
        where = f"{self.folder / self.shard_file(number)}, key {key}, offset {offset}"
        block = os.pread(self._file(number), length, offset)
        if len(block) != length:
            raise ShardError("the shard ends early", where=where, expected=f"{length} bytes", got=f"{len(block)} bytes")
        if checksum(block) != entry["xxh3"]:
            raise ShardError(
                "damaged sample: wrong checksum",
                where=where,
                expected=f"xxh3 {int(entry['xxh3']):016x}",
                got=f"{checksum(block):016x}",
            )
        sample = decode_sample(block, where)
        if sample.key != key:
            raise ShardError("the index names another sample", where=where, expected=key, got=sample.key)
        return sample

    def shard_file(self, number: int) -> str:
        """File name of a shard."""
        return self.manifest["shards"][number]["name"]

    def _file(self, number: int) -> int:
        if number not in self._files:
            path = self.folder / self.shard_file(number)
            try:
                self._files[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise ShardError(f"cannot open a shard: {error.strerror}", where=path) from error
        return self._files[number]
