"""The epoch plan: which samples share a pack, and in which order the packs are trained on.

In: the length of every sample, a token budget, a seed, an epoch. Out: an ordered list of packs, each at most as long
as the budget. Rank r of `world` takes at micro-step a the pack `cursor + a * world + r`.

Guarantees (tests/test_shards.py, tests/test_loader.py):
    The plan depends on its inputs alone, not on ranks, workers or machine.
    An epoch holds every sample exactly once.

Packing is best-fit decreasing over the whole epoch, see `best_fit`; samples of equal length come in random order.

Order: packs of equal length take unequal time, since attention grows with the square of a sample's length, and ranks
wait for the slowest. So packs of similar work are neighbours: packs are shuffled, each `WINDOW` of them is sorted by
work and cut into groups of `GROUP`, then the groups are shuffled, and the packs in each group.

Several sets: without weights, their samples are packed together. With weights, each set is packed by itself. An epoch
then holds every pack of the first set once. Another set is repeated, epoch after epoch of its own; each epoch of the
run takes as many of its packs as its weight asks for, and goes on where the one before stopped. All packs are shuffled.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from higgs_tune.shards.errors import UserError

PLAN_VERSION = 2
GROUP, WINDOW = 64, 1024  # packs
BREAK_EVEN_LENGTH = 23_000  # at the released sizes, a sample of this length takes as long in attention as elsewhere


@dataclass(frozen=True)
class PlanInput:
    """The samples of one shard set, for the plan.

    Attributes:
        rows: int64 [samples], row numbers, unique over all sets.
        lengths: int64 [samples], positions of each sample.
        set_hash: the set's manifest hash.
        weight: share of the packs, relative to the other sets' weights.
    """

    rows: np.ndarray
    lengths: np.ndarray
    set_hash: str
    weight: float = 1.0


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
        """Row numbers of one pack; empty beyond the last pack."""
        if number >= len(self):
            return self.rows[:0]
        return self.rows[self.bounds[number] : self.bounds[number + 1]]

    def take(self, numbers: np.ndarray) -> Plan:
        """The plan of some of the packs, in the given order."""
        sizes = np.diff(self.bounds)[numbers]
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        first = np.repeat(self.bounds[numbers] - bounds[:-1], sizes)
        return Plan(self.rows[first + np.arange(bounds[-1])], bounds)

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
        lengths: int [samples], positions of each sample.
        tokens_per_pack: most positions in a pack.
        seed, epoch, set_hash: the random order depends on these and on `tokens_per_pack`.

    Raises:
        UserError: a sample is longer than a pack. Callers that know the keys check before, and name the sample.
    """
    if len(lengths) and int(lengths.max()) > tokens_per_pack:
        raise UserError("a sample is longer than a pack", expected=tokens_per_pack, got=int(lengths.max()))
    rng = _generator(seed, epoch, set_hash, tokens_per_pack)
    shuffled = rng.permutation(len(rows))
    order, pack_of = best_fit(lengths[shuffled], tokens_per_pack)
    packs = int(pack_of.max(initial=-1)) + 1
    sorted_lengths = lengths[shuffled[order]].astype(np.float64)  # whole numbers below 2**53, so their sums are exact
    work = np.bincount(pack_of, sorted_lengths * (BREAK_EVEN_LENGTH + sorted_lengths), packs)
    rank_of_pack = np.argsort(_order_by_groups(work, rng))
    by_pack = np.argsort(rank_of_pack[pack_of], kind="stable")
    sizes = np.bincount(rank_of_pack[pack_of], minlength=packs)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    return Plan(np.asarray(rows)[shuffled[order[by_pack]]], bounds)


def _order_by_groups(work: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pack numbers in training order: windows, in them groups of similar work, then the packs that fill no group."""
    order = rng.permutation(len(work))
    for first in range(0, len(order), WINDOW):
        window = order[first : first + WINDOW]
        window = window[np.argsort(work[window], kind="stable")]
        rest = len(window) % GROUP
        groups = rng.permuted(rng.permutation(window[rest:].reshape(-1, GROUP)), axis=1)
        order[first : first + WINDOW] = np.concatenate([groups.ravel(), window[:rest]])
    return order


def plan_epoch(inputs: list[PlanInput], *, tokens_per_pack: int, seed: int, epoch: int, weighted: bool) -> Plan:
    """Plan one epoch over one or several sets.

    Args:
        inputs: the sets; with weights, an epoch holds the first exactly once.
        weighted: mix packs by weight; else pack all samples together.

    Raises:
        UserError: a sample is longer than a pack, or a weighted set is empty.
    """
    options = {"tokens_per_pack": tokens_per_pack, "seed": seed}
    set_hash = ",".join(one.set_hash for one in inputs)
    if not weighted:
        rows = np.concatenate([one.rows for one in inputs])
        lengths = np.concatenate([one.lengths for one in inputs])
        return make_plan(rows, lengths, set_hash=set_hash, epoch=epoch, **options)
    plans = []
    main = make_plan(inputs[0].rows, inputs[0].lengths, set_hash=inputs[0].set_hash, epoch=epoch, **options)
    for one in inputs:
        count = round(len(main) * one.weight / inputs[0].weight)
        plans.append(main if one is inputs[0] else _repeated(one, epoch * count, count, options))
    joined = _join(plans)
    return joined.take(_generator(seed, epoch, set_hash, tokens_per_pack).permutation(len(joined)))


def _repeated(one: PlanInput, start: int, count: int, options: dict[str, int]) -> Plan:
    """`count` packs of a set that is repeated epoch after epoch, from pack `start` on."""
    if count and not len(one.rows):
        raise UserError("a set with a weight has no training sample", got=one.set_hash)
    parts, own_epoch = [], None
    while count:
        if own_epoch is None:
            plan = make_plan(one.rows, one.lengths, set_hash=one.set_hash, epoch=0, **options)
            own_epoch = start // len(plan)  # every epoch of a set has the same number of packs
            start -= own_epoch * len(plan)
        plan = make_plan(one.rows, one.lengths, set_hash=one.set_hash, epoch=own_epoch, **options)
        taken = min(count, len(plan) - start)
        parts.append(plan.take(np.arange(start, start + taken)))
        start, count, own_epoch = 0, count - taken, own_epoch + 1
    return _join(parts)


def _join(plans: list[Plan]) -> Plan:
    sizes = [np.diff(plan.bounds) for plan in plans]
    rows = [plan.rows for plan in plans]
    empty = np.zeros(0, np.int64)
    return Plan(np.concatenate([empty, *rows]), np.concatenate([[0], np.cumsum(np.concatenate([empty, *sizes]))]))


def _generator(seed: int, epoch: int, set_hash: str, tokens_per_pack: int) -> np.random.Generator:
    name = json.dumps([PLAN_VERSION, seed, epoch, set_hash, tokens_per_pack])
    return np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(name.encode()).digest()[:16])))


def best_fit(lengths: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: from long to short, each sample goes into the fullest pack that still has room for it.

    Five samples, packs of 8: 5 opens pack 0, 4 opens pack 1, the first 3 fills pack 0 (5 + 3), the second 3 joins
    pack 1 (4 + 3), and 2 opens pack 2, since pack 1 has room for 1 only.

    >>> order, pack_of = best_fit(np.array([3, 5, 4, 2, 3]), budget=8)
    >>> order  # the lengths 5, 4, 3, 3, 2
    array([1, 2, 0, 4, 3])
    >>> pack_of
    array([0, 1, 0, 1, 2])

    All samples of one length are placed together, and packs with equal room too, so the work grows with the number of
    distinct lengths, not of samples.

    Args:
        lengths: int [samples], each from 1 to `budget`.
        budget: most positions in a pack.

    Returns:
        order: int64 [samples], positions in `lengths` from long to short, stable.
        pack_of: int64 [samples], the pack of `lengths[order[i]]`.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    pack_of = np.empty(len(order), np.int64)
    open_packs = _OpenPacks(budget)
    packs, at = 0, 0
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = at + count
        while at < end:
            left = end - at
            room = open_packs.least_room(length)
            if room is None:
                room = budget
                group = packs + np.arange(-(-left // (budget // length)))
                packs += len(group)
            else:
                group = open_packs.take(room)
            each = room // length  # a pack stays the fullest one that fits until it has no room for this length
            used = min(len(group), -(-left // each))
            placed = min(used * each, left)
            pack_of[at : at + placed] = np.repeat(group[:used], each)[:placed]
            at += placed
            in_last = placed - (used - 1) * each
            open_packs.add(room, group[used:])
            open_packs.add(room - each * length, group[: used - 1])
            open_packs.add(room - in_last * length, group[used - 1 : used])
    return order, pack_of


class _OpenPacks:
    """Packs by the room that they have left.

    groups[room]: arrays of pack numbers. has_packs[room]: whether there are any; True at `budget + 1`, to end searches.
    """

    def __init__(self, budget: int) -> None:
        self.groups: list[list[np.ndarray]] = [[] for _ in range(budget + 1)]
        self.has_packs = np.zeros(budget + 2, bool)
        self.has_packs[budget + 1] = True

    def least_room(self, length: int) -> int | None:
        """Room of the fullest pack that has room for `length`; None if no pack has."""
        room = length + int(self.has_packs[length:].argmax())
        return room if room < len(self.groups) else None

    def take(self, room: int) -> np.ndarray:
        """Remove and return the packs with this much room."""
        group = np.concatenate(self.groups[room])
        self.groups[room], self.has_packs[room] = [], False
        return group

    def add(self, room: int, packs: np.ndarray) -> None:
        if len(packs):
            self.groups[room].append(packs)
            self.has_packs[room] = True
