"""Verification of the manifest: its form is checked before its content is used.

In: a folder. Out: a `Manifest`, or findings. File names that lead out of the folder are refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.inspect.verify.diagnose import Finding
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.manifest import MANIFEST, manifest_fault, manifest_files
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.shards.split import ValidationSplit


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
        return manifest_files(self.content)

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
        if not self.split or self.split.by == "split" or not settled or len(np.unique(index["split"])) != 1:
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
    fault = manifest_fault(content)
    if not fault and "model" not in content["provenance"]:
        fault = "provenance: expected the model"
    if fault:
        return None, [Finding("damaged_manifest", fault, MANIFEST)]
    return Manifest(content, hashlib.sha256(data).hexdigest()), []
