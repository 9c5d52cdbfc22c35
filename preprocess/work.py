"""The work folder of an unfinished shard set: what is listed, what is encoded, what is committed.

`OUT/.work/` holds `request.json` (what was asked for), `samples-NNNNNN.jsonl` (one file a shard),
`clips-NNNNNN.jsonl` (one file a unit of clips), `listing.json` (written when both are complete) and `unit-NNNNNN.npz`
(codes of a unit), beside what the shards' writer keeps there. Each appears whole or not at all, so a restarted run
takes up what is there. The folder goes when the set is finished.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..shards import durable
from ..shards.errors import UserError
from ..shards.writer import MANIFEST, WORK
from .audio import Clip
from .reject import Reject

HINT = "Choose another --out, or remove the folder."
Encoded = tuple[np.ndarray, dict[str, Any]]  # codes [K, T], and seconds and sha256 of the source


class Work:
    """Paths and files of `OUT/.work`; cheap to pickle."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / WORK

    def path(self, kind: str, number: int, suffix: str) -> Path:
        return self.folder / f"{kind}-{number:06d}.{suffix}"

    def finished(self, request: dict[str, Any]) -> bool:
        """True where the folder holds the finished set that is asked for.

        Raises:
            UserError: it holds another set.
        """
        manifest = self.out / MANIFEST
        if manifest.is_file():
            if json.loads(manifest.read_bytes()).get("provenance", {}).get("request") == request:
                return True
            raise UserError("this folder holds a shard set made from other data or options", where=self.out, hint=HINT)
        return False

    def begin(self, request: dict[str, Any]) -> None:
        """Open or take up the work folder.

        Raises:
            UserError: the folder holds unfinished work on another set.
        """
        file = self.folder / "request.json"
        if file.is_file() and json.loads(file.read_bytes()) != request:
            raise UserError("this folder holds unfinished work on other data or options", where=self.out, hint=HINT)
        durable.write_bytes(file, durable.to_json(request))

    # what is to be done

    def write_lines(self, kind: str, number: int, lines: Iterable[Any]) -> None:
        durable.write_bytes(self.path(kind, number, "jsonl"), b"".join(durable.to_json(x) + b"\n" for x in lines))

    def read_lines(self, kind: str, number: int) -> list[Any]:
        with self.path(kind, number, "jsonl").open() as file:
            return [json.loads(line) for line in file]

    def clips(self, unit: int) -> list[Clip]:
        return [Clip(**line) for line in self.read_lines("clips", unit)]

    @property
    def listing(self) -> dict[str, int] | None:
        """Numbers of samples, shards, clips and units; None until they are listed."""
        file = self.folder / "listing.json"
        return json.loads(file.read_bytes()) if file.is_file() else None

    def commit_listing(self, listing: dict[str, int]) -> None:
        durable.write_bytes(self.folder / "listing.json", durable.to_json(listing))

    # what is done

    def commit_unit(self, unit: int, results: list[Encoded | Reject]) -> None:
        """Store the codes of a unit's clips, or why a clip has none."""
        codes = [result[0] for result in results if not isinstance(result, Reject)]
        info = [
            {"reject": [result.reason, result.detail, result.file]}
            if isinstance(result, Reject)
            else {"frames": result[0].shape[1], **result[1]}
            for result in results
        ]
        joined = np.concatenate(codes, axis=1) if codes else np.zeros((0, 0), np.uint16)
        _write_npz(self.path("unit", unit, "npz"), info, codes=joined)

    def unit_info(self, unit: int) -> list[dict[str, Any]] | None:
        """One dict a clip: frames, seconds, sha256, or reject; None until the unit is committed."""
        file = self.path("unit", unit, "npz")
        return _read_npz(file)[0] if file.is_file() else None

    def encoded(self, unit: int) -> list[Encoded | Reject]:
        return _read_unit(self.path("unit", unit, "npz"))


def _write_npz(path: Path, notes: Any, **arrays: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, notes=np.frombuffer(durable.to_json(notes), np.uint8), **arrays)  # pyright: ignore[reportArgumentType]
    durable.write_bytes(path, buffer.getvalue())


def _read_npz(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    with np.load(path, allow_pickle=False) as file:
        return json.loads(file["notes"].tobytes()), {name: file[name] for name in file.files if name != "notes"}


@lru_cache(maxsize=256)
def _read_unit(path: Path) -> list[Encoded | Reject]:
    notes, arrays = _read_npz(path)
    results: list[Encoded | Reject] = []
    first = 0
    for info in notes:
        if "reject" in info:
            results.append(Reject(*info["reject"]))
        else:
            results.append((arrays["codes"][:, first : first + info["frames"]], info))
            first += info["frames"]
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
