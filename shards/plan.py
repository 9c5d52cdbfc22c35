"""The epoch plan: which samples share a pack, and in which order the packs are trained on.

In: the length of every sample, a token budget, a seed, an epoch. Out: an ordered list of packs, each at most the
budget long. Never: files, randomness beyond the seed, knowledge of ranks or workers. The same inputs give the same
plan on every machine; rank r of `world` takes at micro-step a the pack `cursor + a * world + r`.

Several sets: without weights their samples are packed together. With weights, each set is packed by itself; an epoch
holds every pack of the first set once, and of every other set as many as its weight asks for, taken from an endless
run of that set's own epochs where the epoch before left off.

Packing is best fit, decreasing, over the whole epoch: samples are taken from long to short (equal lengths in random
order), each goes into the fullest pack that still holds it. Samples of one length are placed together, so the work
grows with the number of distinct lengths, not of samples.

Ranks wait for each other, and packs of one size take as long as their samples are long, since attention grows with the
square. So packs are ordered at random, but packs of like work stand together: each `WINDOW` of packs is sorted by work
and cut into groups of `GROUP`, which are shuffled, as are the packs in each. The packs of sets mixed by weight are
just shuffled.
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
EQUAL_LENGTH = 23_000  # of a sample whose attention takes what all else takes, at the released model's sizes


@dataclass(frozen=True)
class PlanInput:
    """One shard set as the plan sees it.

    Attributes:
        rows: int64 [samples], row numbers, unique over all sets.
        lengths: int64 [samples], positions of each of them.
        set_hash: names the data (its manifest hash).
        weight: share of the packs; compared between sets.
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
        """Row numbers of one pack; empty beyond the last pack (a zero-weight pack of the epoch's tail)."""
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
    sorted_lengths = lengths[shuffled[order]].astype(np.float64)  # whole numbers below 2**53, so their sums are exact
    work = np.bincount(pack_of, sorted_lengths * (EQUAL_LENGTH + sorted_lengths), packs)
    rank_of_pack = np.argsort(_like_with_like(work, rng))
    by_pack = np.argsort(rank_of_pack[pack_of], kind="stable")
    sizes = np.bincount(rank_of_pack[pack_of], minlength=packs)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    return Plan(np.asarray(rows)[shuffled[order[by_pack]]], bounds)


def _like_with_like(work: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pack numbers in training order; of each window the packs that fill no group, those of least work, come last."""
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
        inputs: the sets; with weights, the first is the one that an epoch holds exactly once.
        weighted: mix by weight; else all samples are packed together.

    Raises:
        UserError: a sample is longer than a pack, or a weighted set is empty.
    """
    options = {"tokens_per_pack": tokens_per_pack, "seed": seed}
    if not weighted:
        rows = np.concatenate([given.rows for given in inputs])
        lengths = np.concatenate([given.lengths for given in inputs])
        return make_plan(rows, lengths, set_hash=",".join(given.set_hash for given in inputs), epoch=epoch, **options)
    plans = []
    main = make_plan(inputs[0].rows, inputs[0].lengths, set_hash=inputs[0].set_hash, epoch=epoch, **options)
    for given in inputs:
        count = round(len(main) * given.weight / inputs[0].weight)
        plans.append(main if given is inputs[0] else _endless(given, epoch * count, count, options))
    joined = _join(plans)
    name = ",".join(given.set_hash for given in inputs)
    return joined.take(_generator(seed, epoch, name, tokens_per_pack).permutation(len(joined)))


def _endless(given: PlanInput, start: int, count: int, options: dict[str, int]) -> Plan:
    """`count` packs from position `start` of a set's own epochs, one after another."""
    if count and not len(given.rows):
        raise UserError("a set with a weight has no training sample", got=given.set_hash)
    parts, own_epoch = [], None
    while count:
        if own_epoch is None:
            plan = make_plan(given.rows, given.lengths, set_hash=given.set_hash, epoch=0, **options)
            own_epoch = start // len(plan)  # every epoch of a set has the same number of packs
            start -= own_epoch * len(plan)
        plan = make_plan(given.rows, given.lengths, set_hash=given.set_hash, epoch=own_epoch, **options)
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
