"""The validation split: which samples are held out, by a hash of their key or speaker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xxhash
from higgs_tune.shards.format import Sample
from higgs_tune.shards.index import SPLIT_TRAIN, SPLIT_VAL
from higgs_tune.shards.layout import TWIN

TRAIN, VAL = "train", "val"  # the names of the sides in a manifest


@dataclass(frozen=True)
class ValidationSplit:
    """Hold out the samples whose hashed key (or speaker) falls below the fraction, or those that say so themselves.

    The choice for a sample depends on nothing else, so it survives adding, removing and reordering samples. Two samples
    of one row in both layouts (`TWIN`) are on the same side. By `split` the fraction does not count: a sample's `misc`
    names its side, and nothing is settled.
    """

    fraction: float = 0.0
    by: Literal["sample", "speaker", "split"] = "sample"

    def of(self, sample: Sample) -> int:
        """`SPLIT_VAL` or `SPLIT_TRAIN`."""
        if self.by == "split":
            return SPLIT_VAL if named_side(sample.meta.get("misc")) == VAL else SPLIT_TRAIN
        name = str(sample.meta.get("speaker")) if self.by == "speaker" else sample.key.removesuffix(TWIN)
        return SPLIT_VAL if _digest(name) < self.fraction * 2**64 else SPLIT_TRAIN

    def held_out(self, names: Sequence[str]) -> np.ndarray:
        """Which of several distinct names (keys or speakers) are held out: bool [names].

        Of two names or more at least one is held out and at least one is not: those of the smallest and largest hash.
        """
        digests = np.array([_digest(name.removesuffix(TWIN)) for name in names], np.uint64)
        mask = np.array([int(digest) < self.fraction * 2**64 for digest in digests], np.bool_)
        if self.fraction and len(set(digests.tolist())) > 1:
            mask[digests == digests.min()], mask[digests == digests.max()] = True, False
        return mask

    def settle(self, index: np.ndarray, speakers: Sequence[str]) -> None:
        """Hold out at least one of a set's samples (or speakers), and not all, where there are two or more.

        Args:
            index: all rows of the set, each with its own split; changed in place where none or all are held out.
            speakers: their names by number.
        """
        if self.by == "split" or not self.fraction or len(np.unique(index["split"])) != 1:
            return
        if self.by == "speaker":
            index["split"] = self.held_out([name or str(None) for name in speakers])[index["speaker"]]
        else:
            index["split"] = self.held_out([key.decode() for key in index["key"].tolist()])


def named_side(misc: Any) -> str | None:
    """The side that a sample's `misc` names as its `split`: `train` or `val`; None for anything else."""
    side = misc.get("split") if isinstance(misc, dict) else None
    return side if side in (TRAIN, VAL) else None


def split_sides(held_out_N: np.ndarray, speakers: Sequence[str]) -> dict[str, int]:
    """Samples and speakers on both sides of a split.

    Args:
        held_out_N: bool [N].
        speakers: the speaker of each sample; empty where none is named.
    """
    sides = [
        {name for name, held_out in zip(speakers, held_out_N.tolist(), strict=True) if held_out is side and name}
        for side in (False, True)
    ]
    return {
        "train_samples": int((~held_out_N).sum()),
        "validation_samples": int(held_out_N.sum()),
        "train_speakers": len(sides[0]),
        "validation_speakers": len(sides[1]),
        "speakers_in_both": len(sides[0] & sides[1]),
    }


def _digest(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode())
