"""Verification of the manifest: its form is checked before its content is used.

In: a folder. Out: a `Manifest`, or findings. File names that lead out of the folder are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.inspect.verify.diagnose import Finding
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.format import FORMAT_VERSION
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.shards.split import ValidationSplit
from higgs_tune.shards.writer import MANIFEST

_FILE = {"name": str, "bytes": int, "sha256": str}
_FORM: dict[str, dict[str, type]] = {
    "index": {**_FILE, "rows": int, "xxh3": str},
    "rejects": {**_FILE, "rows": int, "by_reason": dict},
    "totals": {"samples": int, "validation_samples": int},
    "provenance": {"model": dict},
}


@dataclass(frozen=True)
class Manifest:
    """A manifest whose form is sound. hash: SHA-256 of its bytes."""

    content: dict[str, Any]
    hash: str

    @property
    def shards(self) -> list[dict[str, Any]]:
        return self.content["shards"]

    @property
    def mel_shards(self) -> list[dict[str, Any]]:
        return self.content["mel_shards"]

    @property
    def files(self) -> list[dict[str, Any]]:
        """Entries of all files that it names."""
        return [*self.shards, *self.mel_shards, self.content["index"], self.content["rejects"]]

    @property
    def provenance(self) -> dict[str, Any]:
        return self.content["provenance"]

    @property
    def model(self) -> dict[str, Any]:
        return self.provenance["model"]

    @property
    def ids(self) -> SpecialIds:
        return SpecialIds(**self.model["special_ids"])

    @property
    def features(self) -> str:
        return self.provenance.get("features", {}).get("whisper", "none")

    @property
    def split(self) -> ValidationSplit | None:
        """The rule of the validation split; None where it is not in the provenance."""
        options = self.provenance.get("request", {}).get("options", {})
        if not {"val_fraction", "val_by"} <= options.keys():
            return None
        return ValidationSplit(options["val_fraction"], options["val_by"])

    def expected_split(self, index: np.ndarray, speakers: list[str], keys: np.ndarray) -> np.ndarray:
        """The split of index rows, with at least one row of the whole set held out, and not all, as a writer does it.

        Args:
            index: rows with their own splits, perhaps not all of the set.
            speakers: their names by number.
            keys: of the whole set.
        """
        totals = self.content["totals"]
        settled = 0 < totals["validation_samples"] < totals["samples"]  # older writers held out none, or all
        if not self.split or not settled or len(np.unique(index["split"])) != 1:
            return index["split"]
        if self.split.by == "speaker":
            names = sorted({*speakers, *map(str, self.content["speakers"])})
            own = [speakers[number] for number in index["speaker"]]
        else:
            names, own = sorted({*index["key"].tolist(), *keys.tolist()}), index["key"].tolist()
        plain = [name.decode() if isinstance(name, bytes) else name or str(None) for name in names]
        held_out = dict(zip(names, self.split.held_out(plain).tolist(), strict=True))
        return np.array([held_out[name] for name in own], index["split"].dtype)


def read_manifest(folder: Path) -> tuple[Manifest | None, list[Finding]]:
    """The manifest of a set, or findings on it.

    Raises:
        UserError: the folder holds no shard set at all.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if not folder.is_dir() or not any(folder.glob("codes-*.tar")):
            raise UserError("no shard set here", where=folder, expected=MANIFEST)
        detail = "the folder holds shards, but no manifest: the set is not finished, or was damaged"
        return None, [Finding("missing_manifest", detail, MANIFEST)]
    data = path.read_bytes()
    try:
        content = json.loads(data)
    except ValueError as error:
        return None, [Finding("damaged_manifest", f"not JSON: {error}", MANIFEST)]
    if problem := next(_problems(content), ""):
        return None, [Finding("damaged_manifest", problem, MANIFEST)]
    return Manifest(content, hashlib.sha256(data).hexdigest()), []


def _problems(content: Any) -> Iterator[str]:
    """Faults in the form of a manifest. Later ones assume that there is no earlier one: take the first."""
    if not isinstance(content, dict):
        yield "expected an object"
    if content.get("format_version") != FORMAT_VERSION:
        yield f"expected format_version {FORMAT_VERSION}, got {content.get('format_version')!r}"
    for name, form in _FORM.items():
        yield from _form_problems(name, content.get(name), form)
    for name in ("shards", "mel_shards", "speakers"):
        if not isinstance(content.get(name), list):
            yield f"{name}: expected a list"
    for name in ("shards", "mel_shards"):
        for number, entry in enumerate(content[name]):
            yield from _form_problems(f"{name} {number}", entry, {**_FILE, "samples": int})
    names = [entry["name"] for entry in Manifest(content, "").files]
    for name in names:
        if Path(name).name != name or name in ("", "..", MANIFEST):
            yield f"expected the name of a file in the folder, got {name!r}"
    if len(set(names)) != len(names):
        yield "a file is named twice"
    if len(content["mel_shards"]) not in (0, len(content["shards"])):
        yield f"expected no mel shards or {len(content['shards'])}, got {len(content['mel_shards'])}"
    try:
        SpecialIds(**content["provenance"]["model"]["special_ids"])
    except (KeyError, TypeError):
        yield "provenance: expected the special ids of the model"


def _form_problems(where: str, value: Any, form: dict[str, type]) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: expected an object"
    for name, kind in form.items():
        if not isinstance(value.get(name), kind):
            yield f"{where}: expected {name} of type {kind.__name__}, got {value.get(name)!r}"
