"""Remote sets: whole files are uploaded, and read through a bounded local cache.

In: any URL that fsspec knows (`s3://`, `hf://`, `memory://`, …). Out: local files.

Guarantees (tests/test_writer.py):
    A file in the cache is whole, and its SHA-256 is the manifest's.
    Processes that share a cache download a file once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from higgs_tune.shards import durable
from higgs_tune.shards.errors import ShardError, UserError

CHUNK = 1 << 20


def is_url(location: str | Path) -> bool:
    """Whether a location is a URL, not a path."""
    return "://" in str(location)


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
        UserError: the protocol is unknown, or its package is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot open this URL: {error}", where=url) from error


class Target:
    """A remote folder that a set is uploaded to."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def check_writable(self) -> None:
        """Write and delete a small file.

        Raises:
            UserError: one of them fails.
        """
        fs, path = _file_system(self.url)
        probe = f"{path}/{durable.TEMP_PREFIX}probe"
        try:
            fs.makedirs(path, exist_ok=True)
            fs.pipe_file(probe, b"probe")
            fs.rm_file(probe)
        except Exception as error:  # every fsspec file system raises errors of its own
            raise UserError(f"cannot write here: {error}", where=self.url) from error

    def upload(self, local: Path) -> None:
        """Upload one finished file and compare its size.

        Raises:
            UserError: the upload fails, or the remote size differs.
        """
        fs, path = _file_system(self.url)
        try:
            fs.put_file(str(local), f"{path}/{local.name}")
        except Exception as error:
            raise UserError(f"cannot upload: {error}", where=f"{self.url}/{local.name}") from error
        got = self.size(local.name)
        if got != local.stat().st_size:
            where = f"{self.url}/{local.name}"
            raise UserError("uploaded file has a wrong size", where=where, expected=local.stat().st_size, got=got)

    def remove(self, name: str) -> None:
        """Delete a file if it exists.

        Raises:
            UserError: the file system fails.
        """
        fs, path = _file_system(self.url)
        try:
            if self.size(name) is not None:
                fs.rm_file(f"{path}/{name}")
        except Exception as error:
            raise UserError(f"cannot remove: {error}", where=f"{self.url}/{name}") from error

    def size(self, name: str) -> int | None:
        """Size of a remote file in bytes; None if it does not exist."""
        fs, path = _file_system(self.url)
        fs.invalidate_cache()
        return fs.size(f"{path}/{name}") if fs.exists(f"{path}/{name}") else None


@dataclass(frozen=True)
class Cache:
    """Where downloaded files are kept.

    Attributes:
        folder: shared by all ranks of a machine.
        max_bytes: beyond it, the least recently used files are deleted; None: no limit.
    """

    folder: Path
    max_bytes: int | None = None

    @staticmethod
    def default(max_bytes: int | None = None) -> Cache:
        """`$HIGGS_TUNE_CACHE`, else `~/.cache/higgs-tune`."""
        folder = os.environ.get("HIGGS_TUNE_CACHE") or Path.home() / ".cache" / "higgs-tune"
        return Cache(Path(folder), max_bytes)


class Source:
    """A folder that a set is read from: local, or remote through the cache.

    Args:
        location: a path or URL.
        cache: keeps downloaded files; by default `Cache.default()`.
    """

    def __init__(self, location: str | Path, cache: Cache | None = None) -> None:
        self.location = str(location)
        self.remote = is_url(location)
        self.cache = cache or Cache.default()

    def __str__(self) -> str:
        return self.location

    def read(self, name: str) -> bytes:
        """Read a small file, past the cache.

        Raises:
            FileNotFoundError: it does not exist.
            UserError: it cannot be read.
        """
        if not self.remote:
            return (Path(self.location) / name).read_bytes()
        fs, path = _file_system(self.location)
        try:
            return fs.cat_file(f"{path.rstrip('/')}/{name}")
        except FileNotFoundError:
            raise
        except Exception as error:
            raise UserError(f"cannot read: {error}", where=f"{self.location}/{name}") from error

    def fetch(self, name: str, *, set_hash: str, size: int, sha256: str) -> Path:
        """Local path of a file of the set; of a remote set, it is downloaded and verified.

        Args:
            set_hash: names the set's folder in the cache.
            size, sha256: the file's, from the manifest.

        Raises:
            ShardError: the download fails, or its size or SHA-256 is not the manifest's.
        """
        if not self.remote:
            return Path(self.location) / name
        folder = self.cache.folder / set_hash[:16]
        path = folder / name
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            os.utime(path)
            return path
        with _locked(folder / f"{name}.lock"):
            if not path.is_file():  # another rank may have fetched it meanwhile
                self._make_room(size)
                self._download(name, path, size, sha256)
        return path

    def _download(self, name: str, path: Path, size: int, sha256: str) -> None:
        fs, base = _file_system(self.location)
        where, digest, got = f"{self.location}/{name}", hashlib.sha256(), 0
        with durable.atomic_file(path) as file:
            try:
                with fs.open(f"{base.rstrip('/')}/{name}", "rb") as source:
                    while chunk := source.read(CHUNK):
                        file.write(chunk)
                        digest.update(chunk)
                        got += len(chunk)
            except Exception as error:
                raise ShardError(f"cannot download: {error}", where=where) from error
            if (got, digest.hexdigest()) != (size, sha256):
                expected = f"{size} bytes, sha256 {sha256}"
                raise ShardError("not the manifest's file", where=where, expected=expected,
                                 got=f"{got} bytes, sha256 {digest.hexdigest()}")  # fmt: skip

    def _make_room(self, need: int) -> None:
        """Delete the least recently used files; a process that has one open keeps reading it."""
        if self.cache.max_bytes is None:
            return
        files = [path for path in self.cache.folder.glob("*/*") if path.suffix in (".tar", ".npy")]
        files.sort(key=lambda path: path.stat().st_mtime)
        used = sum(path.stat().st_size for path in files)
        for path in files:
            if used + need <= self.cache.max_bytes:
                return
            used -= path.stat().st_size
            path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; the system releases it when the process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
