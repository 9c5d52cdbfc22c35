"""Results of single stages, stored by content: what was computed once is never computed again.

A result is the file `KEY.npz` in the stage's own folder. KEY is a hash of everything that the result depends on: the
recording's bytes, the stage's options, the revision of the model, and the results that it was made from. A file appears
whole or not at all, so a killed run leaves nothing that a rerun could take for a result.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.shards import durable

WORK = "work"
PARTS = "parts"  # of results that are not whole yet; they are removed when a run ends
_META = "meta"


@dataclass(frozen=True)
class Result:
    """What a stage found. key: names it. meta: JSON values. arrays: by name, none with objects."""

    key: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class Stages:
    """The store of a prepared folder; cheap to pickle."""

    out: Path

    def path(self, stage: str, key: str) -> Path:
        return self.out / WORK / stage / f"{key}.npz"

    def read(self, stage: str, depends_on: dict[str, Any]) -> Result | None:
        """The stored result of a stage with these inputs; None where there is none."""
        key = key_of(stage, depends_on)
        try:
            data = self.path(stage, key).read_bytes()
        except FileNotFoundError:
            return None
        with np.load(io.BytesIO(data), allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
        return Result(key, json.loads(arrays.pop(_META).tobytes()), arrays)

    def write(
        self, stage: str, depends_on: dict[str, Any], meta: dict[str, Any], arrays: dict[str, np.ndarray] | None = None
    ) -> Result:
        """Store a result; the same result always gives the same bytes."""
        key, arrays = key_of(stage, depends_on), arrays or {}
        path, buffer = self.path(stage, key), io.BytesIO()
        packed: dict[str, Any] = {_META: np.frombuffer(durable.to_json(meta), np.uint8), **arrays}
        np.savez(buffer, **packed)
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_bytes(path, buffer.getvalue())
        return Result(key, json.loads(durable.to_json(meta)), arrays)


def key_of(stage: str, depends_on: dict[str, Any]) -> str:
    """24 hexadecimal digits of the SHA-256 of a stage's name and inputs."""
    return hashlib.sha256(stage.encode() + b"\0" + durable.to_json(depends_on)).hexdigest()[:24]
