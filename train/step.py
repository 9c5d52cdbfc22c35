"""One optimizer step: batch → forward → loss → backward → clip → optimizer.

In: this rank's micro-batches, and the label counts of the whole step. Out: updated parameters, sums for the metrics.
Guarantees: every rank takes the same steps; the loss does not depend on how samples are spread over ranks, micro-steps
and packs (test_weighting.py); the host never waits for the device (test_speed.py).

Each part of a step's loss (text, each codebook) is a global mean: its sum over the labels of all ranks and micro-steps,
divided by the number of those labels; loss.py weights the parts. The host knows the label counts before the forward
pass, so each pack's loss already carries its share of the mean. DDP averages gradients over ranks where a sum is
needed, hence the factor `world.size`.

Where the parts are: data/batch.py makes a batch; model/pack_model.py calls model/forward.py and model/loss.py;
run_io.py turns `StepStats` into a line of metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import math

import torch
from higgs_tune.train.data.batch import Batch
from higgs_tune.train.dist.faults import explain_out_of_memory
from higgs_tune.train.model.fsdp import whole
from higgs_tune.train.model.loss import LossParts
from higgs_tune.train.monitor.diagnostics import UpdateNorms
from higgs_tune.train.optim import set_rates
from higgs_tune.train.state import Run, StepStats
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW


def take_batches(run: Run, stats: StepStats) -> tuple[list[Batch], list[float]]:
    """This rank's micro-batches of one step, on the device, and their label counts [2 + K] on the host."""
    with stats.waits.timed():
        batches = [next(run.loader) for _ in range(run.config.optim.gradient_accumulation_steps)]
    for batch in batches:
        stats.add_batch(batch)
    stats.steps += 1
    counts = torch.stack([torch.cat([batch["label_counts"], batch["pairs"]]) for batch in batches]).sum(0)
    return [batch.to(run.context.device) for batch in batches], counts.tolist()


def train_step(
    run: Run, batches: list[Batch], label_counts: list[float], stats: StepStats, watch: UpdateNorms | None = None
) -> torch.Tensor:
    """One optimizer step over this rank's micro-batches.

    Args:
        label_counts: [2 + K], over all ranks: text labels, labels of each codebook, pairs of the contrastive loss.
        watch: records gradient and update norms.

    Returns:
        The gradient norm before clipping, a scalar on the device.
    """
    label_weights = run.loss_options.per_label(torch.tensor(label_counts)) * run.context.world.size
    label_weights = label_weights.to(run.context.device, non_blocking=True)
    losses: list[torch.Tensor] = []
    for number, batch in enumerate(batches):
        is_last = number == len(batches) - 1
        with gradient_sync(run.module, is_last), explain_out_of_memory(batch.describe, run.context.device):
            parts: LossParts = run.module(batch, label_weights)  # forward and loss
            parts.total.backward()
        stats.add_loss(parts, only_finite=True)
        losses.append(parts.total.detach())
    if watch:
        watch.record_gradients()
    norm = whole(nn.utils.clip_grad_norm_(run.parameters.values(), run.config.optim.max_grad_norm or math.inf))
    is_finite = torch.isfinite(torch.stack([norm, *losses]))
    run.bad_steps.record(run.progress.step + 1, [batch.keys for batch in batches], is_finite)
    set_rates(run.optimizer, run.config.optim, run.total_steps, run.progress.step)
    optimizer_step(run, skip=~is_finite[0])
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema:
        run.ema.update()
    run.progress.step += 1
    run.progress.cursor = run.schedule.after(run.progress.cursor)
    return norm


def optimizer_step(run: Run, skip: torch.Tensor) -> None:
    """Update the weights, unless `skip` (bool, on the device) says that the gradient is not finite."""
    if isinstance(run.module, FSDPModule) or not isinstance(run.optimizer, AdamW):
        if not skip:  # neither sharded weights nor bitsandbytes' kernel take a flag, so the host waits here
            run.optimizer.step()
        return
    # the fused kernel reads these two, as torch's GradScaler sets them, so that the host need not wait for `skip`
    run.optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
    run.optimizer.found_inf = skip.float()  # pyright: ignore[reportAttributeAccessIssue]
    run.optimizer.step()


def gradient_sync(module: nn.Module, is_last: bool) -> contextlib.AbstractContextManager[None]:
    """Gradients are reduced over ranks once an optimizer step, at its last micro-step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_last)
    return contextlib.nullcontext() if is_last or not isinstance(module, DistributedDataParallel) else module.no_sync()
