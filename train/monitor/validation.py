"""Validation: the loss over the whole held-out split.

In: the validation rows of the shard sets. Out: the metrics that training logs, too. Guarantees: every sample counts
once, on any number of ranks, without dropout (test_long_runs.py).
"""

from __future__ import annotations

import time
from typing import Any

import torch
from higgs_tune.shards.errors import ShardError, UserError
from higgs_tune.shards.plan import Plan, plan_epoch
from higgs_tune.train.data.loader import LoaderOptions, LoadFailure, PackDataset
from higgs_tune.train.data.sampler import PackRequest, Schedule
from higgs_tune.train.metrics import loss_metrics
from higgs_tune.train.model.loss import LossSums
from higgs_tune.train.state import Run

DEFAULT_STEPS = 500


class Validation:
    """The held-out split and its plan.

    Args:
        every: optimizer steps between validations; None: `DEFAULT_STEPS` if there is a split; 0: never.

    Raises:
        UserError: `every` is above 0 and the sets have no split.
    """

    def __init__(self, schedule: Schedule, options: LoaderOptions, every: int | None) -> None:
        self.plan: Plan | None = None
        self.every, self.world = 0, schedule.world
        self._dataset = PackDataset(schedule.sets, options)
        inputs = schedule.plan_inputs(validation=True) if every != 0 else []
        if any(len(given.rows) for given in inputs):
            options_of_plan = {"tokens_per_pack": schedule.tokens_per_pack, "seed": 0, "epoch": 0}
            self.plan = plan_epoch(inputs, **options_of_plan, weighted=False)
            self.every = every or DEFAULT_STEPS
        elif every:
            where = ", ".join(shards.location for shards in schedule.sets.sets)
            raise UserError(
                "--eval_steps: no validation split", where=where, hint="--val_fraction 0.05 holds samples out."
            )

    def due(self, step: int, total: int) -> bool:
        """Whether to validate after a step."""
        return bool(self.every) and (step % self.every == 0 or step == total)

    @torch.no_grad()
    def run(self, run: Run, *, base: bool = False) -> dict[str, Any]:
        """Validate; all ranks call this together.

        Args:
            base: validate the base model, not the trained one.

        Raises:
            ShardError: a sample is damaged.
        """
        assert self.plan is not None
        stats, began = run.new_stats(), time.perf_counter()
        with run.eval_mode(base=base):
            for first in range(0, len(self.plan), self.world.size):
                rows = self.plan.pack(first + self.world.rank)
                weight = int(len(rows) > 0)
                batch = self._dataset[PackRequest(tuple((rows if weight else self.plan.pack(0)).tolist()), weight)]
                if isinstance(batch, LoadFailure):
                    raise ShardError(batch.message)
                ones = torch.ones(2 + run.codebooks, device=run.context.device)
                stats.add_loss(run.module(batch.to(run.context.device), ones), only_finite=False)
        sums = torch.tensor(run.context.all_sum(stats.packed_sums.tolist()))
        return {
            "kind": "eval",
            "step": run.progress.step,
            "epoch": run.epochs_done,
            **loss_metrics(LossSums.unpack(sums, run.codebooks), run.loss_options),
            "samples": len(self.plan.rows),
            "eval_s": time.perf_counter() - began,
        }
