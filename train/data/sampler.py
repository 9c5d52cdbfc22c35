"""The sampler: which packs each rank takes, and in which order.

In: shard sets, rank and world size, a cursor. Out: an endless stream of requests: rank r takes pack
`cursor + a * world + r` at micro-step a.

Guarantees (tests/test_loader.py):
    Every rank makes the same number of steps in an epoch: past the last pack it takes a zero-weight pack.
    Every sample of an epoch is taken once, also when the world size changes in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.plan import Plan, PlanInput, plan_epoch
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.dist.context import World


@dataclass(frozen=True)
class Cursor:
    """The next pack to train on. Independent of the number of ranks."""

    epoch: int = 0
    pack: int = 0


@dataclass(frozen=True)
class PackRequest:
    """A pack to load: rows (numbered over all sets), and weight 0 if no label counts."""

    rows: tuple[int, ...]
    weight: int


class Sets:
    """Several shard sets with one row numbering: the rows of the first set, then those of the second, and so on."""

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        self.sets = list(sets)
        self.starts = np.cumsum([0, *[len(shards) for shards in sets]])

    def speaker(self, shards: ShardSet, row: int) -> int:
        """Number of a row's speaker; speakers of different sets have different numbers."""
        number = self.sets.index(shards)
        before = sum(len(other.manifest["speakers"]) for other in self.sets[:number])
        return before + int(shards.index["speaker"][row])

    def places(self, rows: Sequence[int]) -> Iterator[tuple[ShardSet, list[int]]]:
        """Split rows into runs of the same set, in order: the set, and the rows' numbers in it."""
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(rows)]
        for a, b in pairwise(edges):
            if a < b:
                number = int(numbers[a])
                yield self.sets[number], [row - int(self.starts[number]) for row in rows[a:b]]


class Schedule:
    """The packs of this rank, epoch after epoch, from a cursor on.

    Args:
        sets: shard sets; their training splits are planned.
        mix_weights: a weight for each set (see `plan_epoch`); None packs all samples together.
        tokens_per_pack, seed: see `make_plan`.
        accumulation: packs of a rank in each optimizer step.
        features: Whisper features that the model takes; they count as positions.

    Raises:
        UserError: a sample is longer than a pack (it is named), or there is no training sample.
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        *,
        tokens_per_pack: int,
        seed: int,
        accumulation: int,
        world: World,
        mix_weights: tuple[float, ...] | None = None,
        features: str = "none",
    ) -> None:
        self.sets, self.seed, self.tokens_per_pack = Sets(sets), seed, tokens_per_pack
        self.accumulation, self.world, self.weighted = accumulation, world, mix_weights is not None
        self.features, self.mix_weights = features, mix_weights or (1.0,) * len(sets)
        self.inputs = self.plan_inputs(validation=False)
        if not sum(len(given.rows) for given in self.inputs):
            raise UserError("no training sample", where=", ".join(shards.location for shards in sets))
        self._plans: dict[int, Future[Plan]] = {}
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="plan")

    def plan_inputs(self, *, validation: bool) -> list[PlanInput]:
        """The plan's inputs: each set's training or validation split.

        Raises:
            UserError: a sample is longer than a pack.
        """
        return [
            plan_input(shards, int(start), weight, self.features, self.tokens_per_pack, validation=validation)
            for shards, start, weight in zip(self.sets.sets, self.sets.starts[:-1], self.mix_weights, strict=True)
        ]

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch, the same on every rank; the next epoch's is made in the background."""
        plan = self._planned(epoch).result()
        self._planned(epoch + 1)
        for old in [number for number in self._plans if number < epoch]:
            del self._plans[old]
        return plan

    def _planned(self, epoch: int) -> Future[Plan]:
        if epoch not in self._plans:
            options = {"tokens_per_pack": self.tokens_per_pack, "seed": self.seed, "weighted": self.weighted}
            self._plans[epoch] = self._planner.submit(partial(plan_epoch, self.inputs, epoch=epoch, **options))
        return self._plans[epoch]

    @property
    def packs_per_step(self) -> int:
        """Packs of all ranks in one optimizer step."""
        return self.world.size * self.accumulation

    def steps(self, plan: Plan) -> int:
        """Optimizer steps of a whole epoch; the last may have zero-weight packs."""
        return -(-len(plan) // self.packs_per_step)

    def after(self, cursor: Cursor) -> Cursor:
        """The cursor one optimizer step later."""
        pack = cursor.pack + self.packs_per_step
        return Cursor(cursor.epoch, pack) if pack < len(self.plan(cursor.epoch)) else Cursor(cursor.epoch + 1, 0)

    def requests(self, cursor: Cursor) -> Iterator[PackRequest]:
        """This rank's packs from a cursor on, without end."""
        while True:
            plan = self.plan(cursor.epoch)
            for micro_step in range(self.accumulation):
                rows = plan.pack(cursor.pack + micro_step * self.world.size + self.world.rank)
                if len(rows):
                    yield PackRequest(tuple(rows.tolist()), 1)
                else:
                    yield PackRequest((int(plan.rows[0]),), 0)
            cursor = self.after(cursor)


def plan_input(
    shards: ShardSet, start: int, weight: float, features: str, tokens_per_pack: int, *, validation: bool | None
) -> PlanInput:
    """The samples of a set as input of a plan.

    Args:
        start: number of the set's first row. validation: the validation or the training split; None: all.

    Raises:
        UserError: a sample is longer than a pack.
    """
    rows = np.arange(len(shards)) if validation is None else shards.rows_of(validation=validation)
    lengths = np.asarray(shards.index["tokens"][rows], np.int64)
    if features != "none":
        lengths = lengths + shards.index["mel_tokens"][rows]
    long = rows[lengths > tokens_per_pack]
    if len(long):
        keys = ", ".join(key.decode() for key in shards.index["key"][long[:10]])
        raise UserError(
            f"{len(long)} samples are longer than a pack: {keys}{', …' if len(long) > 10 else ''}",
            where=shards.location,
            expected=f"at most --tokens_per_pack {tokens_per_pack}",
            got=int(lengths.max()),
        )
    return PlanInput(rows + start, lengths, shards.manifest_hash, weight)
