"""The pack of an epoch that holds a sample, and its neighbours there, by the same plan as the trainer's.

In: a set and a row; the options of a run, or its folder. Out: the sample's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from higgs_tune.inspect.stats import packed_lengths
from higgs_tune.inspect.web.run import read_run
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.plan import PlanInput, plan_epoch
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.split import ValidationSplit


@dataclass(frozen=True)
class Packing:
    """The options that determine the packs of an epoch.

    Attributes:
        sets: all shard sets of the run. weights: their mix; None to pack all together.
        features: the model takes the sets' Whisper features, which then count as positions.
    """

    sets: list[ShardSet]
    tokens_per_pack: int
    seed: int
    weights: list[float] | None = None
    features: bool = True

    def lengths(self, shards: ShardSet) -> np.ndarray:
        """int64 [samples]: length of each sample, in positions."""
        return packed_lengths(shards) if self.features else shards.index["tokens"].astype(np.int64)


@dataclass(frozen=True)
class Neighbour:
    """A sample of a pack: its set, its key, and its first position in the pack."""

    location: str
    key: str
    start: int
    is_sample: bool


@dataclass(frozen=True)
class Packed:
    """The pack of a sample: its number among the `packs` of the epoch, its samples in order, its length in positions.

    features: kind of Whisper features that the model takes of the sample.
    """

    pack: int
    packs: int
    neighbours: list[Neighbour]
    length: int
    tokens_per_pack: int
    features: str


def packing_of_run(folder: Path, shards: ShardSet) -> Packing:
    """The packing of a training run.

    Raises:
        UserError: the folder holds no run, or the run did not train on this set.
    """
    config = read_run(folder).config
    options: dict[str, Any] = config.get("options") or {}
    try:
        locations, budget, seed = options["train_data_dir"], options["tokens_per_pack"], options["seed"]
    except KeyError as error:
        raise UserError(f"the run's config lacks {error}", where=folder / "config.yaml") from error
    sets = [ShardSet(location) for location in ([locations] if isinstance(locations, str) else locations)]
    if options.get("val_fraction") is not None:  # the run held samples out by itself
        for one in sets:
            one.hold_out(ValidationSplit(options["val_fraction"], options.get("val_by", "sample")))
    if shards.manifest_hash not in [one.manifest_hash for one in sets]:
        names = ", ".join(one.location for one in sets)
        raise UserError("the run did not train on this set", where=folder, expected=shards.location, got=names)
    features = (config.get("resolved") or {}).get("whisper_features")
    return Packing(sets, budget, seed, options.get("mix_weights"), features=features != "none")


def find_pack(shards: ShardSet, row: int, packing: Packing, epoch: int) -> Packed:
    """The first pack of an epoch that holds a sample.

    Raises:
        UserError: the sample is held out, longer than a pack, or in no pack of this epoch.
    """
    key, budget = shards.index["key"].item(row).decode(), packing.tokens_per_pack
    length = int(packing.lengths(shards)[row])
    if length > budget:
        expected = f"at most --tokens_per_pack {budget}"
        raise UserError("the sample is longer than a pack", where=f"key {key}", expected=expected, got=length)
    own = [one.manifest_hash for one in packing.sets].index(shards.manifest_hash)
    if row not in packing.sets[own].rows_of(validation=False):
        raise UserError(
            "the sample is in no pack: it is held out for validation", where=f"{shards.location}, key {key}"
        )
    starts = np.cumsum([0, *[len(one) for one in packing.sets]])
    lengths = np.concatenate([packing.lengths(one) for one in packing.sets])
    weights = packing.weights or [1.0] * len(packing.sets)
    inputs = []
    for one, start, weight in zip(packing.sets, starts, weights, strict=False):
        rows = one.rows_of(validation=False) + start
        rows = rows[lengths[rows] <= budget]
        inputs.append(PlanInput(rows, lengths[rows], one.manifest_hash, weight))
    options = {"tokens_per_pack": budget, "seed": packing.seed, "weighted": packing.weights is not None}
    plan = plan_epoch(inputs, epoch=epoch, **options)
    at = np.flatnonzero(plan.rows == row + starts[own])
    if not len(at):
        raise UserError(f"the sample is in no pack of epoch {epoch}", where=f"{shards.location}, key {key}")
    pack = int(np.searchsorted(plan.bounds, at[0], side="right")) - 1
    inside = plan.pack(pack)
    ends = np.cumsum(lengths[inside])
    neighbours = []
    for other, end in zip(inside.tolist(), ends.tolist(), strict=True):
        number = int(np.searchsorted(starts, other, side="right")) - 1
        home = packing.sets[number]
        other_key = home.index["key"].item(other - int(starts[number])).decode()
        is_sample = other == row + int(starts[own])
        neighbours.append(Neighbour(home.location, other_key, end - int(lengths[other]), is_sample))
    features = shards.features if packing.features else "none"
    return Packed(pack, len(plan), neighbours, int(ends[-1]), budget, features)
