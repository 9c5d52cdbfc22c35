"""Repair of a set's index: `verify --repair-index` rebuilds it from the shards.

In: a set whose shards are intact. Out: `index.npy`, and the manifest where its entries on the index were wrong.
Guarantees: shards are not changed; a set with a damaged shard is refused (tests/test_verify.py).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import xxhash
from higgs_tune.inspect.verify.diagnose import Finding
from higgs_tune.inspect.verify.verify import Verdict, VerifyOptions, verify_set
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.index import join_index, npy_bytes, totals
from higgs_tune.shards.manifest import MANIFEST
from higgs_tune.shards.writer import INDEX

# kinds of findings that a new index, and new manifest entries on it, repair
REPAIRABLE = {
    "damaged_index",
    "stale_index",
    "wrong_index_row",
    "unindexed_sample",
    "wrong_manifest",
    "wrong_order",
}


def is_repairable(finding: Finding) -> bool:
    return finding.kind in REPAIRABLE or (finding.kind in ("missing_file", "wrong_count") and finding.file == INDEX)


def repair_index(folder: Path, options: VerifyOptions) -> str:
    """Rebuild the index; the result in words.

    Raises:
        UserError: the folder is read-only, or more than the index is wrong, or the split rule is unknown.
    """
    if folder.is_dir():
        durable.check_writable(folder)
    verdict = verify_set(folder, options)
    if not verdict.findings:
        return "nothing to repair"
    index = _rebuilt(folder, verdict)
    data = npy_bytes(index)
    durable.write_bytes(folder / INDEX, data)
    done = f"{INDEX} rebuilt from {len(verdict.results)} shards: {len(index)} rows"
    manifest = verdict.manifest
    assert manifest is not None
    names = join_index([result.array() for result in verdict.results], [result.speakers for result in verdict.results])[
        1
    ]
    entry = {
        "name": INDEX,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "rows": len(index),
        "xxh3": xxhash.xxh3_64_hexdigest(index.view(np.uint8).data),
    }
    corrected = manifest.content | {"index": entry, "totals": totals(index), "speakers": names}
    if corrected == manifest.content:
        return f"{done}, byte for byte the one that the manifest names"
    durable.write_bytes(folder / MANIFEST, durable.to_json(corrected, indent=1) + b"\n")
    return f"{done}; the manifest named another index and was corrected, so runs on the old set cannot be resumed on it"


def _rebuilt(folder: Path, verdict: Verdict) -> np.ndarray:
    """The index computed from the shards."""
    others = [one for one in verdict.findings if not is_repairable(one)]
    if verdict.manifest is None or others:
        faults = "; ".join(f"{one.file} {one.key} {one.kind}: {one.detail}" for one in (others or verdict.findings)[:5])
        raise UserError("the index can only be rebuilt from intact shards", where=folder, got=faults)
    index, names = join_index(
        [result.array() for result in verdict.results], [result.speakers for result in verdict.results]
    )
    index["split"] = verdict.manifest.expected_split(index, names, index["key"])
    if verdict.manifest.split is None:
        old = verdict.index.rows if verdict.index else None
        if old is None or not np.array_equal(old["key"], index["key"]):
            raise UserError(
                "the validation split is not known",
                where=folder,
                expected="val_fraction and val_by in the provenance",
            )
        index["split"] = old["split"]
    return index
