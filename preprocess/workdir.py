"""The work folder of an unfinished shard set: what is listed, what is encoded, what is committed.

`OUT/.work/` holds `request.json` (what was asked for), `samples-NNNNNN.jsonl` (one file a shard),
`clips-NNNNNN.jsonl` (one file a unit of clips), `whisper.bin` (one byte a clip: 1 where it gets Whisper features),
`listing.json` (written when these are complete), `unit-NNNNNN.npz` (codes of a unit) and `mel-NNNNNN.npy` (its
Whisper features), beside what the shards' writer keeps there. Each appears whole or not at all, so a restarted run
takes up what is there. What was rejected is tried again, since the files may have been put right; where anything was,
the lists are written anew, and what was made from other lists is removed. The folder goes when the set is finished.
"""

from __future__ import annotations

import fcntl
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.preprocess.audio.audio import Clip
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError, few
from higgs_tune.shards.writer import WORK

MADE_FROM = {"clips": "unit", "samples": "shard"}  # what is committed of each list
HINT = "Choose another --out, or remove the folder."


@dataclass(frozen=True)
class Features:
    """Whisper features of one chunk. values_CF: float [C, F and up to MEL_TAIL]; frames: F, its true frames."""

    values_CF: np.ndarray
    frames: int


@dataclass(frozen=True)
class Encoded:
    """One encoded clip. codes_KT: uint16 [K, T]; features: of each chunk of 30 s, or none; info: `source`, `seconds`,
    `sha256`, and `flags` where something was noticed."""

    codes_KT: np.ndarray
    features: tuple[Features, ...]
    info: dict[str, Any]


class Work:
    """Paths and files of `OUT/.work`; cheap to pickle."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / WORK

    def path(self, kind: str, number: int, suffix: str) -> Path:
        return self.folder / f"{kind}-{number:06d}.{suffix}"

    def begin(self, request: dict[str, Any]) -> None:
        """Open or take up the work folder.

        Raises:
            UserError: the folder holds unfinished work on another set.
        """
        file = self.folder / "request.json"
        begun = self.listing is not None or any(self.folder.glob("*.npz"))  # else it came to nothing: data unreadable
        if file.is_file() and begun:
            refuse_other(json.loads(file.read_bytes()), request, "unfinished work on", self.out)
        durable.write_bytes(file, durable.to_json(request))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second run out of the folder; the system lifts the lock of a killed one.

        Raises:
            UserError: another run holds it, or the folder cannot be made or written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise UserError(f"cannot make the folder: {error.strerror}", where=self.out) from error
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError("another higgs-preprocess is writing here", where=self.out) from None
            yield

    # what is to be done

    def write_lines(self, kind: str, number: int, lines: Iterable[Any]) -> None:
        """Write the `samples` of a shard or the `clips` of a unit; what was made from other ones goes first."""
        path, data = self.path(kind, number, "jsonl"), b"".join(durable.to_json(line) + b"\n" for line in lines)
        if not path.is_file() or path.read_bytes() != data:
            self.path(MADE_FROM[kind], number, "npz").unlink(missing_ok=True)
            durable.write_bytes(path, data)

    def read_lines(self, kind: str, number: int) -> list[Any]:
        with self.path(kind, number, "jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def clips(self, unit: int) -> list[Clip]:
        return [Clip(**line) for line in self.read_lines("clips", unit)]

    def whisper(self, first: int, count: int) -> bytes:
        """For each of `count` clips from clip `first` on: 1 where it gets Whisper features."""
        with (self.folder / "whisper.bin").open("rb") as file:
            file.seek(first)
            return file.read(count)

    @property
    def listing(self) -> dict[str, int] | None:
        """Numbers of samples, shards, clips and units; None until they are listed."""
        file = self.folder / "listing.json"
        return json.loads(file.read_bytes()) if file.is_file() else None

    def forget_listing(self) -> None:
        """Before the lists are written again: they are not complete until `commit_listing`."""
        (self.folder / "listing.json").unlink(missing_ok=True)
        durable.fsync_folder(self.folder)

    def commit_listing(self, listing: dict[str, int], whisper: bytes) -> None:
        file = self.folder / "whisper.bin"
        if file.is_file() and file.read_bytes() != whisper:
            for unit in self.folder.glob("unit-*.npz"):
                unit.unlink()
        durable.write_bytes(file, whisper)
        durable.write_bytes(self.folder / "listing.json", durable.to_json(listing))

    # what is done

    def commit_unit(self, unit: int, results: list[Encoded | Reject]) -> None:
        """Store the codes and features of a unit's clips, or why a clip has none."""
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
        """The committed units, of `units`; true where a clip of the unit was rejected."""
        found = {path.name for path in self.folder.glob("unit-*.npz")}
        paths = [(unit, self.path("unit", unit, "npz")) for unit in range(units)]
        return {unit: any("reject" in note for note in _notes(path)) for unit, path in paths if path.name in found}

    def take_back(self, unit: int) -> list[Encoded | Reject]:
        """What an earlier run made of a unit, for it to be committed again; nothing, where it made nothing."""
        path = self.path("unit", unit, "npz")
        if not path.is_file():
            return []
        results = self.encoded(unit)
        path.unlink()  # it and its features are two files: the old one must not be found beside new features
        return results

    def encoded(self, unit: int) -> list[Encoded | Reject]:
        """What `commit_unit` stored; features are mapped from the file."""
        path = self.path("unit", unit, "npz")
        return _read_unit(path, path.stat().st_mtime_ns)


def refuse_other(stored: Any, request: dict[str, Any], what: str, where: object) -> None:
    """Refuse a folder that is for another request than this.

    Raises:
        UserError: it is; names what differs.
    """
    if stored == request:
        return
    stored = stored if isinstance(stored, dict) else {}
    new, old = ({**side, **(side.get("options") or {}), "options": None} for side in (request, stored))
    other = few([name for name in {**new, **old} if new.get(name) != old.get(name)])
    raise UserError(f"this folder holds {what} other data or options", where=where, got=f"another {other}", hint=HINT)


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
