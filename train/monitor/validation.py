"""Validation: the losses over the held-out split and over evaluation sets of one's own.

In: the validation rows of the training sets, and named shard sets. Out: for each of them the metrics that training
logs, too. Guarantees: every sample counts once, on any number of ranks, without dropout (test_long_runs.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from higgs_tune.shards.errors import ShardError, UserError
from higgs_tune.shards.plan import Plan, PlanInput, plan_epoch
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.data.batch import Batch
from higgs_tune.train.data.loader import LoaderOptions, LoadFailure, PackDataset
from higgs_tune.train.data.sampler import PackRequest, Schedule, Sets, plan_input
from higgs_tune.train.eval_sets import HELD_OUT
from higgs_tune.train.metrics import loss_metrics
from higgs_tune.train.model.loss import LossSums
from higgs_tune.train.state import Run

DEFAULT_STEPS = 500
Results = dict[str, dict[str, Any]]  # metrics by the name of the set


@dataclass(frozen=True)
class EvalSet:
    """Samples to evaluate on, in packs."""

    name: str
    plan: Plan
    dataset: PackDataset

    def batch(self, number: int) -> Batch:
        """A pack; past the last one, the first with weight 0.

        Raises:
            ShardError: a sample is damaged.
        """
        rows = self.plan.pack(number)
        weight = int(len(rows) > 0)
        batch = self.dataset[PackRequest(tuple((rows if weight else self.plan.pack(0)).tolist()), weight)]
        if isinstance(batch, LoadFailure):
            raise ShardError(batch.message)
        return batch


class Validation:
    """The evaluation sets and when they are due.

    Args:
        every: optimizer steps between validations; None: `DEFAULT_STEPS` if there is a set; 0: never.
        named: evaluation sets besides the held-out split, by name. All their samples count; of a set that is trained
            on, the held-out ones.

    Raises:
        UserError: `every` is above 0 and there is nothing to validate on; a named set has no sample; or a sample is
            longer than a pack.
    """

    def __init__(
        self, schedule: Schedule, options: LoaderOptions, every: int | None, named: Mapping[str, ShardSet] | None = None
    ) -> None:
        self.sets: list[EvalSet] = []
        self.every, self.world = 0, schedule.world
        self._tokens_per_pack = schedule.tokens_per_pack
        if every == 0:
            return
        held_out = schedule.plan_inputs(validation=True)
        if any(len(given.rows) for given in held_out):
            self._add(HELD_OUT, held_out, PackDataset(schedule.sets, options))
        trained = {shards.manifest_hash for shards in schedule.sets.sets}
        for name, shards in (named or {}).items():
            part = True if shards.manifest_hash in trained else None
            given = plan_input(shards, 0, 1.0, schedule.features, schedule.tokens_per_pack, validation=part)
            if not len(given.rows):
                why = "it is trained on, and no sample is held out" if part else "it is empty"
                raise UserError(f"--eval_data_dir {name}: no sample to evaluate on: {why}", where=shards.location)
            self._add(name, [given], PackDataset(Sets([shards]), options))
        if not self.sets and every:
            where = ", ".join(shards.location for shards in schedule.sets.sets)
            hint = "--val_fraction 0.05 holds samples out; --eval_data_dir NAME=SHARDS names sets."
            raise UserError("--eval_steps: no validation split", where=where, hint=hint)
        self.every = (every or DEFAULT_STEPS) if self.sets else 0

    def _add(self, name: str, inputs: list[PlanInput], dataset: PackDataset) -> None:
        plan = plan_epoch(inputs, tokens_per_pack=self._tokens_per_pack, seed=0, epoch=0, weighted=False)
        self.sets.append(EvalSet(name, plan, dataset))

    @property
    def names(self) -> list[str]:
        """Names of the sets, in order."""
        return [one.name for one in self.sets]

    def due(self, step: int, total: int) -> bool:
        """Whether to validate after a step."""
        return bool(self.every) and (step % self.every == 0 or step == total)

    @torch.no_grad()
    def run(self, run: Run, *, base: bool = False) -> Results:
        """Validate on every set; all ranks call this together.

        Args:
            base: validate the base model, not the trained one.

        Raises:
            ShardError: a sample is damaged.
        """
        with run.eval_mode(base=base):
            return {one.name: self._metrics(run, one) for one in self.sets}

    @torch.no_grad()
    def look(self, run: Run, probe: Callable[..., dict[str, Any]], *, base: bool = False) -> Results:
        """What `probe(model, batch)` says of each set's first pack, the same pack at every validation."""
        with run.eval_mode(base=base):
            return {one.name: run.probe(one.batch(0).to(run.context.device), probe) for one in self.sets}

    def _metrics(self, run: Run, one: EvalSet) -> dict[str, Any]:
        stats, began = run.new_stats(), time.perf_counter()
        for first in range(0, len(one.plan), self.world.size):
            batch = one.batch(first + self.world.rank)
            ones = torch.ones(2 + run.codebooks, device=run.context.device)
            stats.add_loss(run.module(batch.to(run.context.device), ones), only_finite=False)
        sums = torch.tensor(run.context.all_sum(stats.packed_sums.tolist()))
        return {
            "kind": "eval",
            "set": one.name,
            "step": run.progress.step,
            "epoch": run.epochs_done,
            **loss_metrics(LossSums.unpack(sums, run.codebooks), run.loss_options),
            "samples": len(one.plan.rows),
            "eval_s": time.perf_counter() - began,
        }
