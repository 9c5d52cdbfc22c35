"""The epoch plan: which samples share a pack, and in which order the packs are trained on.

In: the length of every sample, a token budget, a seed, an epoch. Out: an ordered list of packs, each at most the
budget long. Never: files, randomness beyond the seed, knowledge of ranks or workers. The same inputs give the same
plan on every machine; rank r of `world` takes at micro-step a the pack `cursor + a * world + r`.

Packing is best fit, decreasing, over the whole epoch: samples are taken from long to short (equal lengths in random
order), each goes into the fullest pack that still holds it. Samples of one length are placed together, so the work
grows with the number of distinct lengths, not of samples.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .errors import UserError

PLAN_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """The packs of one epoch, in training order.

    Attributes:
        rows: int64 [samples], row numbers, pack after pack.
        bounds: int64 [packs + 1]; pack i holds rows[bounds[i]:bounds[i + 1]].
    """

    rows: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def pack(self, number: int) -> np.ndarray:
        """Row numbers of one pack; empty beyond the last pack (a zero-weight pack of the epoch's tail)."""
        if number >= len(self):
            return self.rows[:0]
        return self.rows[self.bounds[number] : self.bounds[number + 1]]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the packs and their order."""
        digest = hashlib.sha256(self.rows.astype("<i8").tobytes())
        digest.update(self.bounds.astype("<i8").tobytes())
        return digest.hexdigest()


def make_plan(
    rows: np.ndarray, lengths: np.ndarray, *, tokens_per_pack: int, seed: int, epoch: int, set_hash: str
) -> Plan:
    """Plan one epoch over the given rows.

    Args:
        rows: int [samples], row numbers.
        lengths: int [samples], positions of each of them.
        tokens_per_pack: most positions in a pack.
        seed, epoch, set_hash: what the random order depends on; `set_hash` names the data (its manifest hash).

    Raises:
        UserError: a sample is longer than a pack. Callers that know keys refuse such samples by name before.
    """
    if len(lengths) and int(lengths.max()) > tokens_per_pack:
        raise UserError("a sample is longer than a pack", expected=tokens_per_pack, got=int(lengths.max()))
    rng = _generator(seed, epoch, set_hash, tokens_per_pack)
    shuffled = rng.permutation(len(rows))
    order, pack_of = _best_fit(lengths[shuffled], tokens_per_pack)
    packs = int(pack_of.max(initial=-1)) + 1
    rank_of_pack = rng.permutation(packs)
    by_pack = np.argsort(rank_of_pack[pack_of], kind="stable")
    sizes = np.bincount(rank_of_pack[pack_of], minlength=packs)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    return Plan(np.asarray(rows)[shuffled[order[by_pack]]], bounds)


def _generator(seed: int, epoch: int, set_hash: str, tokens_per_pack: int) -> np.random.Generator:
    name = json.dumps([PLAN_VERSION, seed, epoch, set_hash, tokens_per_pack])
    return np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(name.encode()).digest()[:16])))


def _best_fit(lengths: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing.

    Returns:
        order: int64 [samples], positions in `lengths` from long to short, stable.
        pack_of: int64 [samples], the pack of `lengths[order[i]]`.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    pack_of = np.empty(len(order), np.int64)
    by_room: list[list[np.ndarray]] = [[] for _ in range(budget + 1)]  # packs by the room that they have left
    has_room = np.zeros(budget + 2, bool)
    has_room[budget + 1] = True  # a new pack, when no open one will do
    packs, at = 0, 0
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = at + count
        while at < end:
            room = length + int(has_room[length:].argmax())
            if room > budget:
                room = budget
                new = -(-(end - at) // (budget // length))
                group = np.arange(packs, packs + new)
                packs += new
            else:
                group = np.concatenate(by_room[room]) if len(by_room[room]) > 1 else by_room[room][0]
            each = room // length  # a pack stays the fullest that fits until it holds no more of this length
            used = min(len(group), -(-(end - at) // each))
            taken = min(used * each, end - at)
            pack_of[at : at + taken] = np.repeat(group[:used], each)[:taken]
            at += taken
            _put_back(by_room, has_room, room, group[used:])
            last = taken - (used - 1) * each  # how many the last pack took
            _put_in(by_room, has_room, room - each * length, group[: used - 1])
            _put_in(by_room, has_room, room - last * length, group[used - 1 : used])
    return order, pack_of


def _put_in(by_room: list[list[np.ndarray]], has_room: np.ndarray, room: int, group: np.ndarray) -> None:
    if len(group):
        by_room[room].append(group)
        has_room[room] = True


def _put_back(by_room: list[list[np.ndarray]], has_room: np.ndarray, room: int, rest: np.ndarray) -> None:
    by_room[room] = [rest] if len(rest) else []
    has_room[room] = bool(len(rest))
