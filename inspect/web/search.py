"""Search and sorting over a set of any size, for the server.

In: a shard set. Out: row numbers in order. Sorting uses the index alone. Searching reads every sample's texts once, in
the background; a note tells how many are read so far, and how many are damaged.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import numpy as np
from higgs_tune.inspect.stats import packed_lengths
from higgs_tune.inspect.web.pages import folded, searchable
from higgs_tune.shards.errors import ShardError, UserError
from higgs_tune.shards.index import SPLIT_TRAIN, SPLIT_VAL
from higgs_tune.shards.reader import ShardSet

SORTS = ("row", "key", "speaker", "seconds", "positions", "split")
SPLITS = {"training": SPLIT_TRAIN, "validation": SPLIT_VAL}
WAIT_S = 2.0  # a search waits this long for the texts, then uses those that are read


class SampleSearch:
    """Rows of a set by search words, split and order."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = ShardSet(shards.location, shards.source.cache)  # its files are open in the reading thread only
        self._texts: list[str] = []
        self._damaged = 0
        self._reader = threading.Thread(target=self._read_texts, daemon=True)
        self._start = threading.Lock()
        self._ranks = cache(self._rank)

    def find(self, query: str, split: str, sort: str, *, descending: bool) -> tuple[np.ndarray, str]:
        """Row numbers in order, and a note on samples that could not be searched.

        Raises:
            UserError: no such split or order.
        """
        if sort not in SORTS or split not in ("", *SPLITS):
            raise UserError("no such order or split", expected=", ".join((*SORTS, *SPLITS)), got=f"{sort}, {split}")
        rows, note = np.arange(len(self._shards)), ""
        if words := folded(query).split():
            rows, note = self._search(words)
        if split:
            rows = rows[self._shards.index["split"][rows] == SPLITS[split]]
        ranks = self._ranks(sort)[rows]
        return rows[np.argsort(-ranks if descending else ranks, kind="stable")], note

    def _rank(self, sort: str) -> np.ndarray:
        """int64 [samples]: equal values have equal ranks."""
        index = self._shards.index
        values: Any = {
            "row": lambda: np.arange(len(index)),
            "positions": lambda: packed_lengths(self._shards),
        }.get(sort, lambda: index[sort])()
        return np.unique(values, return_inverse=True)[1]  # speakers are numbered in the order of their names

    def _search(self, words: list[str]) -> tuple[np.ndarray, str]:
        with self._start:
            if not self._reader.is_alive() and not self._texts:
                self._reader = threading.Thread(target=self._read_texts, daemon=True)
                self._reader.start()
        self._reader.join(WAIT_S)
        texts = self._texts[:]
        rows = [row for row, text in enumerate(texts) if all(word in text for word in words)]
        notes = []
        if len(texts) < len(self._shards):
            notes.append(f"texts of {len(texts):,} of {len(self._shards):,} samples are read so far: search again")
            keys = self._shards.index["key"][len(texts) :].tolist()
            unread = (key.decode().lower() for key in keys)
            rows += [row for row, key in enumerate(unread, len(texts)) if all(word in key for word in words)]
        if self._damaged:
            notes.append(f"{self._damaged} damaged samples could not be searched, see higgs-inspect verify")
        return np.array(rows, np.int64), "; ".join(notes)

    def _read_texts(self) -> None:
        for row in range(len(self._shards)):
            try:
                self._texts.append(searchable(self._shards.read(row)))
            except ShardError:
                self._damaged += 1
                self._texts.append(folded(self._shards.index["key"][row].decode()))
