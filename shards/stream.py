"""A set as a webdataset pipeline, for other tools.

    from higgs_tune.shards import stream
    for sample in stream("s3://bucket/shards", shuffle=1000).batched(16): ...

In: a folder or URL. Out: a `webdataset.DataPipeline` of dicts in webdataset's form: `__key__`, `__url__`, `json` (a
dict), `tokens.npy`, `codes.npy` (arrays), and on demand `mel.npy.zst` (a tuple of arrays). Each rank and worker gets
its share of the rows.

Samples are read and verified by our reader: webdataset's own silently loses the rest of a shard after a damaged header.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.remote import Cache
from webdataset.filters import shuffle as shuffle_buffer
from webdataset.pipeline import DataPipeline
from webdataset.utils import pytorch_worker_info


def stream(
    location: str | Path,
    *,
    shuffle: int = 0,
    seed: int = 0,
    validation: bool = False,
    mels: bool = False,
    cache: Cache | None = None,
) -> DataPipeline:
    """Stream a set's samples.

    Args:
        location: folder or URL of the set.
        shuffle: 0: in order. Else the rows are shuffled, and the samples again in a buffer of this size.
        seed: of both shuffles.
        validation: the validation split instead of the training split.
        mels: read Whisper features too.
        cache: keeps downloaded files.

    Raises:
        UserError, ShardError: the set cannot be read, or, while iterating, a sample is damaged.
    """
    source = _Rows(ShardSet(location, cache), validation=validation, mels=mels, seed=seed if shuffle else None)
    stages: list[Any] = [source]
    if shuffle:
        stages.append(shuffle_buffer(shuffle, seed=seed))
    return DataPipeline(*stages)


class _Rows:
    """The pipeline's source: reads this rank's and worker's rows."""

    def __init__(self, shards: ShardSet, *, validation: bool, mels: bool, seed: int | None) -> None:
        self.shards, self.validation, self.mels, self.seed = shards, validation, mels, seed

    def __call__(self) -> Iterator[dict[str, Any]]:
        rank, world, worker, workers = pytorch_worker_info()
        rows = self.shards.rows_of(validation=self.validation)
        if self.seed is not None:
            rows = np.random.default_rng(self.seed).permutation(rows)
        for row in rows[rank * workers + worker :: world * workers].tolist():
            sample = self.shards.read(row, mels=self.mels)
            fields = {"__key__": sample.key, "__url__": self.shards.location, "json": sample.meta}
            fields |= {"tokens.npy": sample.tokens_2L, "codes.npy": sample.codes_KT}
            yield fields | ({"mel.npy.zst": sample.mels} if sample.mels else {})


class _CallableModule(ModuleType):
    """Makes `from higgs_tune.shards import stream` work: the folder has no __init__.py to hold the function."""

    __call__ = staticmethod(stream)


sys.modules[__name__].__class__ = _CallableModule
