"""One optimizer step, the same on every rank.

In: this rank's micro-batches. Out: updated parameters, sums for the metrics. Never: a host synchronisation with the
device; a loss that depends on how samples are spread over ranks, micro-steps and packs.

The label counts of the whole step are known on the host, so the ranks add them up there, and the loss of each pack
already carries its share of the global mean. DDP averages gradients over ranks and the loss is a sum over them, hence
the factor of the world's size.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from ..shards.sequence import SpecialIds
from .batch import Batch
from .config import TrainConfig
from .data import Loader
from .diagnostics import UpdateWatch
from .forward import hidden_states
from .loss import LossOptions, LossParts, pack_loss
from .model import HiggsAudioModel
from .reference import reference_loss
from .setup import Place


class PackModel(nn.Module):
    """Forward and loss as one module. It registers only what trains, so that is all that DDP sees and sends."""

    def __init__(self, model: HiggsAudioModel, parameters: Iterable[nn.Parameter], options: LossOptions) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters)
        self.options = options
        self._model = (model,)  # in a tuple: not a submodule

    def forward(self, batch: Batch, label_weights: torch.Tensor) -> LossParts:
        model = self._model[0]
        if batch.reference is not None:
            return reference_loss(model, batch.reference, label_weights, self.options, weight=batch.weight)
        return pack_loss(model, hidden_states(model, batch), batch, label_weights, self.options)


@dataclass
class Window:
    """What happened since the last report, on this rank: sums on the device, counts on the host."""

    sums: torch.Tensor
    hits: torch.Tensor
    counts: torch.Tensor
    eos: torch.Tensor
    contrastive: torch.Tensor
    steps: int = 0
    positions: int = 0
    samples: int = 0
    seconds: float = 0.0
    wait_s: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    @staticmethod
    def empty(codebooks: int, device: torch.device) -> Window:
        sums, hits, counts = torch.zeros(3, 1 + codebooks, device=device)
        eos, contrastive = torch.zeros(2, codebooks, device=device), torch.zeros(2, device=device)
        return Window(sums, hits, counts, eos, contrastive)

    def add(self, parts: LossParts) -> None:
        """Add a pack's sums."""
        self.sums += parts.sums
        self.hits += parts.hits
        self.counts += parts.counts
        self.eos += parts.eos
        self.contrastive += parts.contrastive

    def stats(self) -> torch.Tensor:
        """All sums as one tensor."""
        return torch.cat([self.sums, self.hits, self.counts, self.eos.flatten(), self.contrastive]).double()


@dataclass
class Run:
    """Everything that the steps need."""

    config: TrainConfig
    place: Place
    model: HiggsAudioModel
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: AdamW
    scheduler: LambdaLR
    loss: LossOptions
    loader: Loader
    steps_per_epoch: int
    total_steps: int

    @property
    def codebooks(self) -> int:
        return self.model.config.audio_num_codebooks

    @property
    def special_ids(self) -> SpecialIds:
        return self.loader.special_ids

    def window(self) -> Window:
        return Window.empty(self.codebooks, self.place.device)


def take_batches(run: Run, window: Window) -> tuple[list[Batch], list[float]]:
    """The micro-batches of one step, and their label and pair counts; the time waited for them is counted."""
    began = time.perf_counter()
    batches = [next(run.loader) for _ in range(run.config.gradient_accumulation_steps)]
    window.wait_s += time.perf_counter() - began
    counts = torch.zeros(2 + run.codebooks, dtype=torch.int64)
    for batch in batches:
        counts += torch.cat([batch["label_counts"], batch["pairs"]])
        window.positions += batch.positions * batch.weight
        window.samples += len(batch.keys) * batch.weight
        window.seconds += batch.seconds * batch.weight
    window.steps += 1
    return [batch.to(run.place.device) for batch in batches], counts.tolist()


def train_step(
    run: Run, batches: list[Batch], counts: list[float], window: Window, watch: UpdateWatch | None = None
) -> torch.Tensor:
    """One optimizer step over this rank's micro-batches.

    Args:
        counts: [2 + K], label and pair counts of the whole step, over all ranks.
        watch: looks at the gradients on the way.

    Returns:
        The gradient norm before clipping, on the device.
    """
    label_weights = run.loss.per_label(torch.tensor(counts)).to(run.place.device) * run.place.world.size
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        with contextlib.nullcontext() if last else _without_sync(run.module):
            parts: LossParts = run.module(batch, label_weights)
            parts.total.backward()
        window.add(parts)
    if watch:
        watch.see_gradients()
    norm = nn.utils.clip_grad_norm_(run.parameters.values(), run.config.max_grad_norm or math.inf)
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    return norm


def _without_sync(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Gradients are sent once an optimizer step, at its last micro-step."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()
