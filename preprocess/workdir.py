"""The work folder of an unfinished shard set: task lists and encoded units.

`OUT/.work/` holds `request.json` (data, checkpoints and options of the build), `samples-NNNNNN.jsonl` (one file a
shard), `clips-NNNNNN.jsonl` (one file a unit of clips), `whisper.bin` (one byte a clip: 1 where it gets Whisper
features), `listing.json` (written when these are complete), `unit-NNNNNN.npz` (codes of a unit) and `mel-NNNNNN.npy`
(its Whisper features), beside the files of the shards' writer. Each appears whole or not at all, so a restarted run
continues from them. Rejected samples and clips are tried again, since the files may have been mended: then the lists
are written anew, and units and shards made from other lists are removed. The folder goes when the set is finished.

Shapes: K codebooks, T frames of codes, C mel bins or tower channels, F frames of features.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.preprocess.audio.clip import Clip
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError, few
from higgs_tune.shards.lock import locked
from higgs_tune.shards.writer import WORK

RESULT_OF = {"clips": "unit", "samples": "shard"}  # the committed file that is made from each list


@dataclass(frozen=True)
class Features:
    """Whisper features of one chunk of at most 30 s.

    Attributes:
        values_CF: float [C, F and up to MEL_TAIL more].
        frames: F, without the tail.
    """

    values_CF: np.ndarray
    frames: int


@dataclass(frozen=True)
class Encoded:
    """One encoded clip.

    Attributes:
        codes_KT: uint16 [K, T].
        features: one for each chunk of 30 s; empty if none were requested.
        info: `source`, `seconds`, `sha256`, and `flags` if there are any.
    """

    codes_KT: np.ndarray
    features: tuple[Features, ...]
    info: dict[str, Any]


class WorkFolder:
    """Paths and files of `OUT/.work`; cheap to pickle."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / WORK

    def path(self, kind: str, number: int, suffix: str) -> Path:
        return self.folder / f"{kind}-{number:06d}.{suffix}"

    def begin(self, request: dict[str, Any]) -> None:
        """Begin a set, or continue the one that the folder holds.

        Raises:
            UserError: the folder holds unfinished work on another set.
        """
        file = self.folder / "request.json"
        begun = self.listing is not None or any(self.folder.glob("*.npz"))  # else reading the data failed
        if file.is_file() and begun:
            refuse_other(json.loads(file.read_bytes()), request, "unfinished work on", self.out)
        durable.write_bytes(file, durable.to_json(request))

    def locked(self) -> AbstractContextManager[None]:
        """Keep a second run out of the folder within the block; see `shards/lock.py`."""
        return locked(self.folder / "lock", "higgs-preprocess", self.out)

    # task lists

    def write_lines(self, kind: str, number: int, lines: Iterable[Any]) -> None:
        """Write the `samples` of a shard or the `clips` of a unit; a result made from another list is removed first."""
        path, data = self.path(kind, number, "jsonl"), b"".join(durable.to_json(line) + b"\n" for line in lines)
        if not path.is_file() or path.read_bytes() != data:
            self.path(RESULT_OF[kind], number, "npz").unlink(missing_ok=True)
            durable.write_bytes(path, data)

    def read_lines(self, kind: str, number: int) -> list[Any]:
        with self.path(kind, number, "jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def clips(self, unit: int) -> list[Clip]:
        return [Clip(**line) for line in self.read_lines("clips", unit)]

    def whisper(self, first: int, count: int) -> bytes:
        """One byte for each of `count` clips from clip `first` on: 1 if the clip gets Whisper features."""
        with (self.folder / "whisper.bin").open("rb") as file:
            file.seek(first)
            return file.read(count)

    @property
    def listing(self) -> dict[str, int] | None:
        """Numbers of samples, shards, clips and units; None until they are listed."""
        file = self.folder / "listing.json"
        return json.loads(file.read_bytes()) if file.is_file() else None

    def forget_listing(self) -> None:
        """Mark the lists as incomplete until `commit_listing`."""
        (self.folder / "listing.json").unlink(missing_ok=True)
        durable.fsync_folder(self.folder)

    def commit_listing(self, listing: dict[str, int], whisper: bytes) -> None:
        file = self.folder / "whisper.bin"
        if file.is_file() and file.read_bytes() != whisper:
            for unit in self.folder.glob("unit-*.npz"):
                unit.unlink()
        durable.write_bytes(file, whisper)
        durable.write_bytes(self.folder / "listing.json", durable.to_json(listing))

    # results

    def commit_unit(self, unit: int, results: list[Encoded | Reject]) -> None:
        """Store the codes and features of a unit's clips, or the reason why a clip was rejected."""
        encoded = [result for result in results if isinstance(result, Encoded)]
        features = [feature for result in encoded for feature in result.features]
        if features:
            buffer = io.BytesIO()
            np.save(buffer, np.concatenate([f.values_CF.T.astype(np.float16) for f in features]))
            durable.write_bytes(self.path("mel", unit, "npy"), buffer.getvalue())
        notes = [
            {"reject": [result.reason, result.detail, result.file]}
            if isinstance(result, Reject)
            else result.info
            | {"frames": result.codes_KT.shape[1]}
            | {"features": [(f.values_CF.shape[1], f.frames) for f in result.features]}
            for result in results
        ]
        codes = [result.codes_KT for result in encoded]
        joined = np.concatenate(codes, axis=1) if codes else np.zeros((0, 0), np.uint16)
        buffer = io.BytesIO()
        np.savez(buffer, notes=np.frombuffer(durable.to_json(notes), np.uint8), codes=joined)
        durable.write_bytes(self.path("unit", unit, "npz"), buffer.getvalue())

    def done(self, units: int) -> dict[int, bool]:
        """The committed ones of the units 0 to `units`; the value is true if a clip of the unit was rejected."""
        committed = {path.name for path in self.folder.glob("unit-*.npz")}
        paths = [(unit, self.path("unit", unit, "npz")) for unit in range(units)]
        return {unit: any("reject" in note for note in _notes(path)) for unit, path in paths if path.name in committed}

    def reopen_unit(self, unit: int) -> list[Encoded | Reject]:
        """An earlier run's results for a unit, which is then to be committed again; empty if there are none."""
        path = self.path("unit", unit, "npz")
        if not path.is_file():
            return []
        results = self.encoded(unit)
        path.unlink()  # codes and features are two files: old codes must not stand beside new features
        return results

    def encoded(self, unit: int) -> list[Encoded | Reject]:
        """The results that `commit_unit` stored; features are memory-mapped."""
        path = self.path("unit", unit, "npz")
        return _read_unit(path, path.stat().st_mtime_ns)


def refuse_other(stored: Any, request: dict[str, Any], what: str, where: object) -> None:
    """Make sure that a folder was begun for the same request.

    Raises:
        UserError: it was begun for another one; names the options that differ.
    """
    if stored == request:
        return
    stored = stored if isinstance(stored, dict) else {}
    new, old = ({**side, **(side.get("options") or {}), "options": None} for side in (request, stored))
    other = few([name for name in {**new, **old} if new.get(name) != old.get(name)])
    hint = "Choose another --out, or remove the folder."
    raise UserError(f"this folder holds {what} other data or options", where=where, got=f"another {other}", hint=hint)


def _notes(unit: Path) -> list[dict[str, Any]]:
    with np.load(unit, allow_pickle=False) as file:
        return json.loads(file["notes"].tobytes())


@lru_cache(maxsize=256)
def _read_unit(path: Path, _mtime_ns: int) -> list[Encoded | Reject]:
    with np.load(path, allow_pickle=False) as file:
        notes, codes_KT = json.loads(file["notes"].tobytes()), file["codes"]
    mel = path.with_name(path.name.replace("unit", "mel")).with_suffix(".npy")
    stored_FC = np.load(mel, mmap_mode="r", allow_pickle=False) if any(note.get("features") for note in notes) else None
    results: list[Encoded | Reject] = []
    code = row = 0
    for note in notes:
        if "reject" in note:
            results.append(Reject(*note["reject"]))
            continue
        frames, chunks = note.pop("frames"), note.pop("features")
        features = []
        for size, true_frames in chunks:
            assert stored_FC is not None
            features.append(Features(stored_FC[row : row + size].T, true_frames))
            row += size
        results.append(Encoded(codes_KT[:, code : code + frames], tuple(features), note))
        code += frames
    return results


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items; the last may be shorter."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
