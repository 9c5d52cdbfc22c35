"""Rebuild a set's index from its shards.

In: a set whose shards are intact. Out: `index.npy`, and the manifest where what it says of the index was wrong. Never:
a change to a shard; an index of a set with a damaged shard.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import xxhash
from higgs_tune.inspect.verify.diagnose import Finding
from higgs_tune.inspect.verify.verify import Verdict, VerifyOptions, verify
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.index import join_index, npy_bytes, totals
from higgs_tune.shards.writer import INDEX, MANIFEST

# findings that a new index, and the manifest's entries about it, can mend
MENDABLE = {
    "damaged_index",
    "stale_index",
    "wrong_index_row",
    "unindexed_sample",
    "wrong_manifest",
    "wrong_order",
}


def mendable(finding: Finding) -> bool:
    return finding.kind in MENDABLE or (finding.kind in ("missing_file", "wrong_count") and finding.file == INDEX)


def repair_index(folder: Path, options: VerifyOptions) -> str:
    """Rebuild the index and say what was done.

    Raises:
        UserError: something else than the index is wrong, or the rule of the held-out samples is not known.
    """
    verdict = verify(folder, options)
    if not verdict.findings:
        return "nothing to repair"
    index = _rebuilt(folder, verdict)
    data = npy_bytes(index)
    durable.write_bytes(folder / INDEX, data)
    done = f"{INDEX} rebuilt from {len(verdict.checked)} shards: {len(index)} rows"
    manifest = verdict.manifest
    assert manifest is not None
    names = join_index([one.array() for one in verdict.checked], [one.speakers for one in verdict.checked])[1]
    entry = {
        "name": INDEX,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "rows": len(index),
        "xxh3": xxhash.xxh3_64_hexdigest(index.view(np.uint8).data),
    }
    mended = manifest.content | {"index": entry, "totals": totals(index), "speakers": names}
    if mended == manifest.content:
        return f"{done}, byte for byte the one that the manifest names"
    durable.write_bytes(folder / MANIFEST, durable.to_json(mended, indent=1) + b"\n")
    return f"{done}; the manifest named another index and was corrected, so runs on the old set cannot be resumed on it"


def _rebuilt(folder: Path, verdict: Verdict) -> np.ndarray:
    """The index that the shards ask for."""
    others = [one for one in verdict.findings if not mendable(one)]
    if verdict.manifest is None or others:
        found = "; ".join(f"{one.file} {one.key} {one.kind}: {one.detail}" for one in (others or verdict.findings)[:5])
        raise UserError("the index can only be rebuilt from intact shards", where=folder, got=found)
    index, _ = join_index([one.array() for one in verdict.checked], [one.speakers for one in verdict.checked])
    if verdict.manifest.split is None:
        old = verdict.index.rows if verdict.index else None
        if old is None or not np.array_equal(old["key"], index["key"]):
            raise UserError(
                "which samples are held out is not known",
                where=folder,
                expected="val_fraction and val_by in the provenance",
            )
        index["split"] = old["split"]
    return index
