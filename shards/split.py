"""The validation split: which samples are held out, by a hash of their key or speaker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xxhash
from higgs_tune.shards.format import Sample
from higgs_tune.shards.index import SPLIT_TRAIN, SPLIT_VAL


@dataclass(frozen=True)
class ValidationSplit:
    """Hold out the samples whose hashed key (or speaker) falls below the fraction.

    The choice for a sample depends on nothing else, so it survives adding, removing and reordering samples.
    """

    fraction: float = 0.0
    by: Literal["sample", "speaker"] = "sample"

    def of(self, sample: Sample) -> int:
        """`SPLIT_VAL` or `SPLIT_TRAIN`."""
        name = str(sample.meta.get("speaker")) if self.by == "speaker" else sample.key
        return SPLIT_VAL if _digest(name) < self.fraction * 2**64 else SPLIT_TRAIN

    def held_out(self, names: Sequence[str]) -> np.ndarray:
        """Which of several distinct names (keys or speakers) are held out: bool [names].

        Of two names or more at least one is held out and at least one is not: those of the smallest and largest hash.
        """
        digests = np.array([_digest(name) for name in names], np.uint64)
        mask = np.array([int(digest) < self.fraction * 2**64 for digest in digests], np.bool_)
        if self.fraction and len(names) > 1:
            mask[digests.argmin()], mask[digests.argmax()] = True, False
        return mask


def _digest(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode())
