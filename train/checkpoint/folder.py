"""Checkpoint folders: `checkpoint-STEP`, written in a thread by `Saver`.

In: tensors and JSON. Out: a folder of safetensors and JSON files with `checksums.json`.
Guarantees: a folder under its final name is complete and verified (test_faults.py); a damaged file is not loaded
(test_resume.py).

A save writes to a temporary folder, fsyncs, reads everything back and compares it bit by bit, then renames.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

VERSION = 1
STATE, CHECKSUMS = "state.json", "checksums.json"
_NAME = re.compile(r"checkpoint-\d+")
_BLOCK = 1 << 24
RETRY_AFTER_S = 1.0


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint, in host memory.

    step: optimizer steps done. state: JSON. tensors: by file, then by name. texts: other files.
    """

    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, torch.Tensor]]
    texts: dict[str, bytes] = field(default_factory=dict)


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return folder / f"checkpoint-{step}"


def checkpoint_step(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named by: checkpoint-STEP, best-STEP."""
    return int(checkpoint.name.rpartition("-")[2])


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of an output folder, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (checkpoint_step(path), path), reverse=True)


def write_checkpoint(folder: Path, snapshot: Snapshot) -> None:
    """Write a snapshot, verify it, and rename it to its final name.

    Raises:
        UserError: it cannot be written, or reads back differently; nothing is left behind.
    """
    temp = folder.with_name(f"{durable.TEMP_PREFIX}{folder.name}")
    old = folder.with_name(f"{durable.TEMP_PREFIX}old-{folder.name}")
    try:
        for leftover in (temp, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temp.mkdir(parents=True)
        _check_free(folder, snapshot)
        for name, tensors in snapshot.tensors.items():
            save_file(tensors, temp / name, metadata={"format": "pt"})
        for name, text in (snapshot.texts | {STATE: durable.to_json(snapshot.state, indent=1)}).items():
            (temp / name).write_bytes(text)
        for path in sorted(temp.iterdir()):
            durable.fsync_file(path)
        for name, tensors in snapshot.tensors.items():
            _compare(temp / name, tensors)
        sums = {path.name: _checksum(path) for path in sorted(temp.iterdir())}
        (temp / CHECKSUMS).write_bytes(durable.to_json(sums, indent=1))
        durable.fsync_file(temp / CHECKSUMS)
        durable.fsync_folder(temp)
        if folder.exists():
            folder.rename(old)
        temp.rename(folder)
        durable.fsync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temp, ignore_errors=True)
        raise UserError(f"cannot save the checkpoint: {error}", where=folder) from error
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise


def _check_free(folder: Path, snapshot: Snapshot) -> None:
    """Raise UserError if the disk has no room for a snapshot."""
    tensors = sum(value.nbytes for named in snapshot.tensors.values() for value in named.values())
    durable.check_free(folder.parent, tensors + sum(map(len, snapshot.texts.values())))


def _compare(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError if a file does not hold exactly these tensors."""
    with safe_open(path, framework="pt") as stored:
        names = set(stored.keys())
        if names != tensors.keys():
            raise UserError("a saved file reads back with other keys", where=path, got=sorted(names ^ tensors.keys()))
        for name, value in tensors.items():
            back = stored.get_tensor(name)
            same = back.shape == value.shape and back.dtype == value.dtype
            if not same or not torch.equal(_bytes_of(back), _bytes_of(value)):
                raise UserError(f"a saved tensor reads back differently: {name}", where=path)


def _bytes_of(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().flatten().view(torch.uint8)


def _checksum(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Check every file of a checkpoint; returns its state.

    Raises:
        UserError: it is no checkpoint, has another version, or is damaged; names the file.
    """
    try:
        sums = json.loads((folder / CHECKSUMS).read_bytes())
        for name, expected in sums.items():
            if (got := _checksum(folder / name)) != expected:
                raise UserError("the checkpoint is damaged", where=folder / name, expected=expected, got=got)
        state = json.loads((folder / STATE).read_bytes())
    except FileNotFoundError as error:
        raise UserError("not a whole checkpoint", where=error.filename, expected="a file") from error
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"the checkpoint is damaged: {error}", where=folder) from error
    if state.get("version") != VERSION:
        raise UserError("a checkpoint of another version", where=folder, expected=VERSION, got=state.get("version"))
    return state


def is_valid(folder: Path) -> bool:
    """Whether a checkpoint is complete and undamaged."""
    try:
        verify_checkpoint(folder)
    except UserError:
        return False
    return True


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint (None: there is none), and an error message for each newer one."""
    problems = []
    for path in list_checkpoints(folder):
        try:
            verify_checkpoint(path)
        except UserError as error:
            problems.append(str(error))
        else:
            return path, problems
    return None, problems


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a file with their names, one at a time."""
    with safe_open(path, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118  (safe_open is no mapping)
            yield name, stored.get_tensor(name)


def prune(saved: Path, keep: int | None) -> None:
    """Remove checkpoints older than the one just saved, so that `keep` are left; None keeps all.

    Newer ones are damaged ones of an earlier start: they do not count.
    """
    every = list_checkpoints(saved.parent)
    for path in every[every.index(saved) :][keep:] if keep else []:
        remove(path)


def remove(folder: Path) -> None:
    """Rename a folder, then remove it, so that a part of it never stands under its name."""
    doomed = folder.with_name(f"{durable.TEMP_PREFIX}removed-{folder.name}")
    with suppress(OSError):
        durable.remove(doomed)
    folder.rename(doomed)
    with suppress(OSError):
        durable.remove(doomed)


class Saver:
    """Writes snapshots in a thread, one after the other.

    Args:
        folder: the run's output folder.
        keep: number of checkpoints to keep; None: all.
        say: shows a line for each save; called in the thread that writes.
    """

    def __init__(self, folder: Path, keep: int | None, say: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.keep, self.say = folder, keep, say
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._pending: list[Future[None]] = []

    def checkpoint(self, snapshot: Snapshot) -> None:
        """Begin to save a checkpoint; waits if the previous one is still being written."""
        self._join()
        self._pending.append(self._writer.submit(self._write, checkpoint_path(self.folder, snapshot.step), snapshot))

    def best(self, snapshot: Snapshot) -> None:
        """Begin to save the best adapter so far; it replaces the previous best."""
        self._join()
        self._pending.append(self._writer.submit(self._write, self.folder / f"best-{snapshot.step}", snapshot))

    def failures(self) -> list[str]:
        """Errors of saves that have ended since the last call."""
        done = [save for save in self._pending if save.done()]
        self._pending = [save for save in self._pending if not save.done()]
        return [str(error) for save in done if (error := save.exception())]

    def finish(self) -> list[str]:
        """Wait for every save; returns the errors."""
        self._join()
        return self.failures()

    def _join(self) -> None:
        for save in self._pending:
            save.exception()

    def _write(self, path: Path, snapshot: Snapshot) -> None:
        began = time.monotonic()
        try:
            write_checkpoint(path, snapshot)
        except UserError as error:
            self.say(f"warning: {error}; trying once more")
            time.sleep(RETRY_AFTER_S)
            write_checkpoint(path, snapshot)
        self._announce(path, time.monotonic() - began)
        if path.name.startswith("best-"):
            for older in self.folder.glob("best-*"):
                if older != path:
                    remove(older)
        else:
            prune(path, self.keep)

    def _announce(self, path: Path, seconds: float) -> None:
        """One line about a save, and a warning where the disk has no room for two more."""
        size = sum(file.stat().st_size for file in path.iterdir())
        free = shutil.disk_usage(path).free
        self.say(f"saved {path}: {size / 1e6:,.1f} MB in {seconds:.1f} s, verified; {free / 1e9:.1f} GB of disk free")
        if free < 2 * size:
            self.say(f"warning: {free / 1e9:.2f} GB of disk are free, and a checkpoint takes {size / 1e9:.2f} GB")
