"""Differences between two shard sets: `higgs-inspect diff`.

In: two sets. Out: keys added, removed and changed, with the changes of each. Samples with equal checksums are not read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from higgs_tune.inspect.view import turns_of
from higgs_tune.preprocess.progress import ProgressBar
from higgs_tune.shards.format import Sample
from higgs_tune.shards.reader import ShardSet

PROVENANCE = ("model", "codec", "features")


@dataclass(frozen=True)
class Change:
    """A sample of both sets that differs. parts: the difference in words, by part (text, codes, labels, …)."""

    key: str
    parts: dict[str, str]


@dataclass(frozen=True)
class SetDiff:
    """added: keys only in the second set; removed: keys only in the first; same: number of equal samples."""

    added: list[str]
    removed: list[str]
    changed: list[Change]
    same: int
    provenance: dict[str, str]

    @property
    def equal(self) -> bool:
        return not (self.added or self.removed or self.changed or self.provenance)

    def to_dict(self) -> dict[str, Any]:
        return {"equal": self.equal, **asdict(self)}


def diff_sets(a: ShardSet, b: ShardSet) -> SetDiff:
    """Compare two sets by key.

    Raises:
        ShardError: a sample that must be read is damaged.
    """
    keys_a, keys_b = a.index["key"], b.index["key"]
    _, rows_a, rows_b = np.intersect1d(keys_a, keys_b, return_indices=True)
    in_order = np.argsort(rows_a)
    rows_a, rows_b = rows_a[in_order], rows_b[in_order]
    names = ("xxh3", "mel_xxh3", "split")
    differ = np.logical_or.reduce([a.index[name][rows_a] != b.index[name][rows_b] for name in names])
    changed, same = [], int((~differ).sum())
    with ProgressBar() as progress:
        progress.start("compare", int(differ.sum()), "samples")
        for row_a, row_b in zip(rows_a[differ].tolist(), rows_b[differ].tolist(), strict=True):
            changed.append(Change(keys_a.item(row_a).decode(), _parts(a, row_a, b, row_b)))
            progress.advance(1)
    return SetDiff(
        added=[key.decode() for key in np.delete(keys_b, rows_b).tolist()],
        removed=[key.decode() for key in np.delete(keys_a, rows_a).tolist()],
        changed=changed,
        same=same,
        provenance={
            name: f"{a.provenance.get(name)} → {b.provenance.get(name)}"
            for name in PROVENANCE
            if a.provenance.get(name) != b.provenance.get(name)
        },
    )


def _parts(a: ShardSet, row_a: int, b: ShardSet, row_b: int) -> dict[str, str]:
    first, second = a.read(row_a), b.read(row_b)
    parts = {
        "text": _texts(first, second),
        "tokens": _arrays(first.tokens_2L[0], second.tokens_2L[0], "tokens"),
        "labels": _arrays(first.tokens_2L[1], second.tokens_2L[1], "labels"),
        "codes": _arrays(first.codes_KT, second.codes_KT, "codes"),
        "metadata": _metadata(first, second),
        "features": "differ" if a.index["mel_xxh3"][row_a] != b.index["mel_xxh3"][row_b] else "",
        "split": "the other split" if a.index["split"][row_a] != b.index["split"][row_b] else "",
    }
    return {name: text for name, text in parts.items() if text}


def _texts(first: Sample, second: Sample) -> str:
    """The first text that differs, in the first set and in the second."""
    a, b = ([part for turn in turns_of(one) for part in turn.parts if isinstance(part, str)] for one in (first, second))
    if a == b:
        return ""
    pairs = zip(a, b, strict=False)
    old, new = next(((x, y) for x, y in pairs if x != y), (f"{len(a)} texts", f"{len(b)} texts"))
    return f"{old} → {new}"


def _arrays(first: np.ndarray, second: np.ndarray, name: str) -> str:
    if first.shape != second.shape:
        return f"{' × '.join(map(str, first.shape))} → {' × '.join(map(str, second.shape))}"
    count = int((first != second).sum())
    return f"{count} of {first.size} {name} differ" if count else ""


def _metadata(first: Sample, second: Sample) -> str:
    """Names of the fields that differ; of the messages the roles only, since texts are a part of their own."""
    roles = [[(turn.role, len(turn.parts)) for turn in turns_of(one)] for one in (first, second)]
    names = sorted((first.meta.keys() | second.meta.keys()) - {"messages"})
    differing = [name for name in names if first.meta.get(name) != second.meta.get(name)]
    return ", ".join([*(["roles"] if roles[0] != roles[1] else []), *differing])
