"""Makes the training record of a run (`higgs_tune.json`) from its shard sets.

In: the sets, the base checkpoint, the adapter that is continued. Out: a `TrainingRecord`. Counts come from the
manifests; what those lack, from up to `PROBE` samples of each set, so that a set of 10 M samples costs no more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.preprocess.checkpoints.training_record import TrainingRecord, read_record
from higgs_tune.preprocess.input.layout import Conversation, read_conversation
from higgs_tune.shards.errors import ShardError
from higgs_tune.shards.layout import LAYOUTS, layout_of
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.model.base import base_reference

PROBE = 64  # samples of a set that are looked at
MAX_NAMES = 100
LANGUAGE_KEYS = ("language", "lang", "language_id", "locale")


def make_record(sets: Sequence[ShardSet], stage: str, base: Path, adapter: Path | None) -> TrainingRecord:
    """The record of a run.

    Args:
        base, adapter: what the run starts from; the stages of their own records come before `stage`.
    """
    earlier = read_record(adapter or base)
    name, revision = base_reference(base, base)
    metas = [list(_probe(shards)) for shards in sets]
    seen = [meta for of_set in metas for meta in of_set]
    told = [made for meta in seen if (made := read_conversation(meta["messages"]))]
    layouts, counted = _layouts(sets, metas)
    speakers = sorted({name for shards in sets for name in shards.manifest["speakers"] if name})
    normalizations: Counter[str] = Counter()
    for shards in sets:
        normalizations[str(shards.provenance.get("text_normalization", "none"))] += len(shards)
    codecs = {str(shards.provenance.get("codec", {}).get("weights_sha256") or "") for shards in sets}
    return TrainingRecord(
        stages=(*(earlier.stages if earlier else ()), stage),
        base_name=name if revision else base.resolve().name,
        base_revision=revision,
        samples=sum(map(len, sets)),
        hours=round(sum(shards.manifest["totals"]["seconds"] for shards in sets) / 3600, 6),
        layouts=layouts,
        layouts_from=counted,
        text_normalizations=dict(normalizations),
        languages=dict(Counter(filter(None, map(_language, seen))).most_common()),
        speakers=len(speakers),
        speaker_names=tuple(speakers[:MAX_NAMES]),
        looked_at=len(seen),
        system=_most(made.system for made in told),
        instruction=_most(_instructions(told, references=True)),
        plain_instruction=_most(_instructions(told, references=False)),
        codec=next(iter(codecs)) or None if len(codecs) == 1 else None,
    )


def _probe(shards: ShardSet) -> Iterator[dict[str, Any]]:
    """Metadata of training samples spread over a set; of a remote set those of one shard. Damaged ones are left out."""
    rows = shards.rows_of(validation=False)
    if shards.source.remote:
        rows = rows[:PROBE]
    for row in rows[np.linspace(0, len(rows) - 1, min(len(rows), PROBE)).astype(int)]:
        try:
            yield shards.read(int(row)).meta
        except ShardError:  # training names it, and knows whether to go on
            continue


def _layouts(sets: Sequence[ShardSet], metas: Sequence[Sequence[dict[str, Any]]]) -> tuple[dict[str, int], str]:
    """Samples by layout, from the manifests; of a set whose manifest does not count them all, from its samples."""
    counts, looked_at = dict.fromkeys(LAYOUTS, 0), 0
    for shards, seen in zip(sets, metas, strict=True):
        stored = shards.manifest.get("layouts")
        if isinstance(stored, dict) and stored.keys() == counts.keys() and sum(stored.values()) == len(shards):
            found = stored
        else:  # made by an earlier version, or repaired
            probed = Counter(layout_of(meta["messages"]) for meta in seen)
            looked_at += len(seen)
            found = {name: round(len(shards) * count / len(seen)) for name, count in probed.items()}
        for name, count in found.items():
            counts[name] += count
    return counts, f"{looked_at} samples looked at" if looked_at else "all samples"


def _instructions(told: Iterable[Conversation], *, references: bool) -> Iterator[str]:
    return (made.instruction for made in told if made.layout == "chat" and bool(made.references) is references)


def _most(texts: Iterable[str]) -> str | None:
    return next((text for text, _ in Counter(texts).most_common(1)), None)


def _language(meta: dict[str, Any]) -> str:
    misc = meta.get("misc") or {}
    return next((str(misc[name]) for name in LANGUAGE_KEYS if isinstance(misc.get(name), str)), "")
