"""The form of a set's manifest: checked before its content is used.

In: a parsed `manifest.json`. Out: its first fault, in words.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from higgs_tune.shards.format import FORMAT_VERSION
from higgs_tune.shards.layout import LAYOUTS
from higgs_tune.shards.sequence import SpecialIds

MANIFEST = "manifest.json"
Form = dict[str, type | tuple[type, ...]]
_FILE: Form = {"name": str, "bytes": int, "sha256": str}
_SECTIONS: dict[str, Form] = {
    "index": {**_FILE, "rows": int, "xxh3": str},
    "rejects": {**_FILE, "rows": int, "by_reason": dict},
    "totals": {
        **dict.fromkeys(("samples", "validation_samples", "tokens", "text_labels", "audio_labels"), int),
        "seconds": (int, float),
    },
    "provenance": {},
}
_LAYOUTS: Form = dict.fromkeys(LAYOUTS, int)
_MODEL: Form = {"special_ids": dict, "codebook_size": (int, type(None)), "text_vocabulary": (int, type(None))}
_IDS: Form = dict.fromkeys(SpecialIds.__dataclass_fields__, int)


def manifest_fault(manifest: Any) -> str:
    """The first fault in the form of a manifest; empty where it is sound."""
    return next(_faults(manifest), "")


def _faults(manifest: Any) -> Iterator[str]:
    """Later faults assume that there is no earlier one."""
    yield from _object_faults("manifest", manifest, {"format_version": int})
    if manifest["format_version"] != FORMAT_VERSION:
        yield f"expected format_version {FORMAT_VERSION}, got {manifest['format_version']}"
    for name, form in _SECTIONS.items():
        yield from _object_faults(name, manifest.get(name), form)
    for name, kind in (("shards", dict), ("mel_shards", dict), ("speakers", str)):
        if not isinstance(manifest.get(name), list) or not all(isinstance(item, kind) for item in manifest[name]):
            yield f"{name}: expected a list of {kind.__name__}"
    for name in ("shards", "mel_shards"):
        for number, entry in enumerate(manifest[name]):
            yield from _object_faults(f"{name} {number}", entry, {**_FILE, "samples": int})
    names = [entry["name"] for entry in manifest_files(manifest)]
    for name in names:
        if Path(name).name != name or name in ("", "..", MANIFEST):
            yield f"expected the name of a file in the folder, got {name!r}"
    if len(set(names)) != len(names):
        yield "a file is named twice"
    if len(manifest["mel_shards"]) not in (0, len(manifest["shards"])):
        yield f"expected no mel shards or {len(manifest['shards'])}, got {len(manifest['mel_shards'])}"
    if "layouts" in manifest:  # sets of before have none
        yield from _object_faults("layouts", manifest["layouts"], _LAYOUTS)
    yield from _provenance_faults(manifest["provenance"])


def _provenance_faults(provenance: dict[str, Any]) -> Iterator[str]:
    for name in ("model", "codec", "features", "paths", "request"):
        if not isinstance(provenance.get(name, {}), dict):
            yield f"provenance: expected {name} to be an object"
    for name, path in provenance.get("paths", {}).items():
        if not isinstance(path, str):
            yield f"provenance: expected the path of {name} to be text, got {path!r}"
    if "model" in provenance:
        model = {"codebook_size": None, "text_vocabulary": None, **provenance["model"]}
        yield from _object_faults("provenance of the model", model, _MODEL)
        yield from _object_faults("special ids", model["special_ids"], _IDS)
        if unknown := model["special_ids"].keys() - _IDS.keys():
            yield f"special ids: unknown {', '.join(sorted(unknown))}"


def manifest_files(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of all files that a manifest names."""
    return [*manifest["shards"], *manifest["mel_shards"], manifest["index"], manifest["rejects"]]


def _object_faults(where: str, value: Any, form: Form) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: expected an object"
    for name, kinds in form.items():
        item = value.get(name)
        if not isinstance(item, kinds) or isinstance(item, bool):
            wanted = kinds.__name__ if isinstance(kinds, type) else " or ".join(kind.__name__ for kind in kinds)
            yield f"{where}: expected {name} of type {wanted}, got {item!r:.40}"
        if isinstance(item, int | float) and item < 0:
            yield f"{where}: expected {name} of at least 0, got {item}"
