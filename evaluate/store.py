"""Judgements on disk: each is stored at once, so a killed evaluation continues from it.

In: the content hash of a clip. Out: what the judges said of it. The file is JSON lines that only grow; its name holds a
hash of the judges, so that other judges begin another file, and the normaliser is not part of it. Of several ranks each
has a file of its own (`judgements-HASH.part-1.jsonl`), which `merge_parts` joins.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.shards.durable import to_json
from higgs_tune.shards.errors import UserError


class JudgementStore:
    """Judgements by clip.

    Args:
        folder: the evaluation's.
        judges: their names, revisions and settings.
        part: the rank whose file it is, where there are several.
    """

    def __init__(self, folder: Path, judges: dict[str, Any], part: int | None = None) -> None:
        digest = hashlib.sha256(to_json(judges)).hexdigest()[:12]
        whole = folder / f"judgements-{digest}.jsonl"
        self.path = whole if part is None else whole.with_suffix(f".part-{part}.jsonl")
        self._entries: dict[str, dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in dict.fromkeys((whole, self.path)):
                self._load(path)
            self._file = self.path.open("ab")
        except OSError as error:
            raise UserError(f"cannot write: {error.strerror or error}", where=self.path) from error

    def _load(self, path: Path) -> None:
        """Read the whole lines; cut off the last one where a killed run left a part of it."""
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self._entries[entry["clip"]] = entry
            except (ValueError, TypeError, KeyError) as error:
                hint = "Remove the file to judge anew."
                raise UserError("damaged judgement", where=f"{path}, line {number}", hint=hint) from error
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))

    def get(self, clip: str) -> dict[str, Any] | None:
        """The judgement of a clip, by its key; None where it has none yet."""
        return self._entries.get(clip)

    def put(self, clip: str, entry: dict[str, Any]) -> None:
        """Store a judgement; it survives the death of the process."""
        self._entries[clip] = entry
        self._file.write(to_json(entry | {"clip": clip}) + b"\n")
        self._file.flush()

    def merge_parts(self) -> None:
        """Take in the files of all ranks; none of them may be at work."""
        for path in sorted(self.path.parent.glob(f"{self.path.stem}.part-*.jsonl")):
            before = set(self._entries)
            self._load(path)
            for clip in self._entries.keys() - before:
                self.put(clip, self._entries[clip])
            path.unlink()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def pack_vector(vector_D: np.ndarray | None) -> str | None:
    """An embedding as base64 of little-endian float32."""
    return None if vector_D is None else base64.b64encode(np.asarray(vector_D, "<f4").tobytes()).decode()


def unpack_vector(text: str | None) -> np.ndarray | None:
    """Inverse of `pack_vector`."""
    return None if text is None else np.frombuffer(base64.b64decode(text), "<f4")
