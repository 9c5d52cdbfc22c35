"""Durable files: a file either has its whole content or does not exist.

A file is written under a temporary name in the same folder, fsynced, then renamed; then its folder is fsynced. A killed
process leaves only names that start with `TEMP_PREFIX`, which `remove_leftovers` deletes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from higgs_tune.shards.errors import STORAGE_ERRNOS, UserError

TEMP_PREFIX = ".tmp-"


def fsync_folder(folder: Path) -> None:
    """fsync a folder, so that the names in it are durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    """fsync a file's content."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that gets the name `path` when the block ends without an exception.

    Raises:
        UserError: the folder cannot be written, or the disk is full; no file remains.
    """
    temp = path.with_name(f"{TEMP_PREFIX}{os.getpid()}-{path.name}")
    try:
        with temp.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        temp.unlink(missing_ok=True)
        raise UserError(f"cannot write: {error.strerror or error}", where=path) from error
    except BaseException:
        temp.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic_file(path) as file:
        file.write(data)


def to_json(value: Any, *, indent: int | None = None) -> bytes:
    """JSON in UTF-8 with sorted keys: the same value always gives the same bytes."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, indent=indent, separators=separators, allow_nan=False)
    return text.encode()


def from_json(data: bytes, what: str, where: object) -> dict[str, Any]:
    """Parse a file's JSON object.

    Args:
        what, where: the file's name and path in an error message.

    Raises:
        UserError: the data is not a JSON object.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not JSON: {error}", where=where) from error
    if not isinstance(value, dict):
        raise UserError(f"{what} has the wrong content", where=where, expected="a JSON object", got=f"{value!r:.40}")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a log; a last line without a line break is still being written and is left out.

    Raises:
        UserError: a line is not a JSON object.
    """
    complete = path.read_bytes().rpartition(b"\n")[0].split(b"\n")
    lines = []
    for place, line in enumerate(complete, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UserError(f"line {place} is not JSON: {error}", where=path) from error
            if not isinstance(value, dict):
                raise UserError(f"line {place} is not an object", where=path, got=value)
            lines.append(value)
    return lines


def check_writable(folder: Path, need_bytes: int = 0, file_bytes: int = 1) -> None:
    """Make a folder, and check that files can be written to it.

    Args:
        need_bytes: free disk space that they need.
        file_bytes: size of the largest file, or less; quotas and limits must allow it.

    Raises:
        UserError: the folder cannot be made or written, or the disk has less free space.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_free(folder, need_bytes)
    except OSError as error:
        raise UserError(f"cannot make the folder: {error.strerror}", where=folder) from error
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=TEMP_PREFIX, buffering=0) as probe:
            probe.write(b"probe")
            _allocate(probe.fileno(), file_bytes)
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror}", where=folder) from error


def check_free(folder: Path, need_bytes: int) -> None:
    """Check the free space of a folder's disk.

    Raises:
        UserError: it is less than `need_bytes`.
        OSError: the folder is not there.
    """
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        size, unit = (1e9, "GB") if need_bytes >= 1e8 else (1e6, "MB")
        expected, got = f"{need_bytes / size:.2f} {unit}", f"{free / size:.2f} {unit}"
        raise UserError("not enough free disk space", where=folder, expected=expected, got=got)


def _allocate(fd: int, size: int) -> None:
    """Reserve a file's bytes, where the file system can: a full disk, a quota or a limit raises OSError."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno in STORAGE_ERRNOS:
            raise


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders of killed writers, directly in this folder."""
    for leftover in folder.glob(f"{TEMP_PREFIX}*"):
        with suppress(OSError):
            remove(leftover)


def remove(path: Path) -> None:
    """Remove a file, a link (not its target), or a folder with its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
