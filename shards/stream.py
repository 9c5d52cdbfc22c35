"""A set as a webdataset pipeline, for other tools.

    from higgs_tune.shards import stream
    for sample in stream("s3://bucket/shards", shuffle=1000).batched(16): ...

In: a folder or URL. Out: a `webdataset.DataPipeline` of dicts in webdataset's form: `__key__`, `__url__`, `json` (a
dict), `tokens.npy`, `codes.npy` (arrays), and on demand `mel.npy.zst` (a tuple of arrays). Never: webdataset's own tar
reader, which loses the rest of a shard after a damaged header without a word; every sample comes verified.

Ranks and workers each get their share of the rows, as webdataset's environment names them.
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
        shuffle: size of the shuffle buffer; more than 0 also shuffles the rows as a whole. 0: in order.
        seed: of both shuffles.
        validation: the held-out split instead of the training split.
        mels: Whisper features too.
        cache: where files of a URL are kept.

    Raises:
        UserError, ShardError: the set cannot be read; while iterating, a sample is damaged.
    """
    source = _Rows(ShardSet(location, cache), validation=validation, mels=mels, seed=seed if shuffle else None)
    stages: list[Any] = [source]
    if shuffle:
        stages.append(shuffle_buffer(shuffle, seed=seed))
    return DataPipeline(*stages)


class _Rows:
    """The first stage of the pipeline: this rank's and worker's rows, read and verified."""

    def __init__(self, shards: ShardSet, *, validation: bool, mels: bool, seed: int | None) -> None:
        self.shards, self.validation, self.mels, self.seed = shards, validation, mels, seed

    def __call__(self) -> Iterator[dict[str, Any]]:
        rank, world, worker, workers = pytorch_worker_info()
        rows = self.shards.rows_of(validation=self.validation)
        if self.seed is not None:
            rows = np.random.default_rng(self.seed).permutation(rows)
        for row in rows[rank * workers + worker :: world * workers].tolist():
            sample = self.shards.read(row, mels=self.mels)
            found = {"__key__": sample.key, "__url__": self.shards.location, "json": sample.meta}
            found |= {"tokens.npy": sample.tokens_2L, "codes.npy": sample.codes_KT}
            yield found | ({"mel.npy.zst": sample.mels} if sample.mels else {})


class _CallableModule(ModuleType):
    """The folder has no __init__.py that could hold the function, so the module can be called itself."""

    __call__ = staticmethod(stream)


sys.modules[__name__].__class__ = _CallableModule
