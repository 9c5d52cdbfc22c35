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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from ..shards.sequence import SpecialIds
from .batch import Batch
from .config import TrainConfig
from .data import Loader
from .diagnostics import UpdateWatch
from .faults import BadSteps, naming_memory
from .forward import Running, hidden_states, label_states
from .lora import base_only, evaluating
from .loss import LossOptions, LossParts, pack_loss
from .model import HiggsAudioModel
from .optim import Ema, learning_rates, set_rates
from .readback import Mark, Stopwatch
from .reference import reference_loss
from .schedule import Cursor, Schedule
from .setup import Place
from .sharded import whole


class PackModel(nn.Module):
    """Forward and loss as one module.

    Args:
        parameters: what trains; registering only that, it is all that DDP sees and sends. None: the whole model is
            registered, for FSDP.
    """

    def __init__(
        self,
        model: HiggsAudioModel,
        parameters: Iterable[nn.Parameter] | None,
        options: LossOptions,
        running: Running = Running(),  # noqa: B008
    ) -> None:
        super().__init__()
        if parameters is None:
            self.model = model
        else:
            self.trained = nn.ParameterList(parameters)
        self.options, self.running = options, running
        self._model = (model,)  # in a tuple: not a submodule

    def forward(self, batch: Batch, label_weights: torch.Tensor, look: Callable[..., Any] | None = None) -> Any:
        """The loss share of a pack; or with `look`, what that says of the model and the batch, whose weights are then
        all there."""
        model = self._model[0]
        if look is not None:
            return look(model, batch)
        if batch.reference is not None:
            return reference_loss(model, batch.reference, label_weights, self.options, weight=batch.weight)
        if self.options.contrastive:
            return pack_loss(model, hidden_states(model, batch, self.running), batch, label_weights, self.options)
        states = label_states(model, batch, self.running)
        return pack_loss(model, states, batch, label_weights, self.options, at_labels=True)


@dataclass
class Window:
    """What happened since the last report, on this rank: sums on the device, counts on the host.

    began: where the window before ended. waits: for batches. pauses: what is no training, such as validation.
    """

    total: torch.Tensor
    began: Mark
    waits: Stopwatch
    pauses: Stopwatch
    steps: int = 0
    positions: int = 0
    samples: int = 0
    audio_rows: int = 0
    squares: int = 0
    seconds: float = 0.0

    @staticmethod
    def empty(codebooks: int, device: torch.device, began: Mark | None = None) -> Window:
        total = torch.zeros(3 * (1 + codebooks) + 2 * codebooks + 2, device=device, dtype=torch.float64)
        return Window(total, began or Mark(device), Stopwatch(device), Stopwatch(device))

    def add(self, parts: LossParts, *, only_finite: bool) -> None:
        """Add a pack's sums: losses, right predictions and labels of text and each codebook; of EOS; of pairs.

        Args:
            only_finite: leave the pack out if its loss is not finite, as where its step is skipped for that.
        """
        values = torch.cat([parts.sums, parts.hits, parts.counts, parts.eos.flatten(), parts.contrastive]).double()
        self.total += torch.where(torch.isfinite(parts.total), values, 0.0) if only_finite else values


@dataclass
class Progress:
    """How far a run is.

    step: optimizer steps done. cursor: where their data ended. best_loss, best_step: of validation. stale: validations
    since then.
    """

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    best_loss: float | None = None
    best_step: int = 0
    stale: int = 0


@dataclass
class Run:
    """Everything that the steps need.

    peft_model: the model with its adapters; the bare model where every weight trains.
    """

    config: TrainConfig
    place: Place
    model: HiggsAudioModel
    peft_model: nn.Module
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: AdamW
    loss: LossOptions
    loader: Loader
    schedule: Schedule
    total_steps: int
    progress: Progress
    bad: BadSteps
    ema: Ema | None = None

    @property
    def rate_share(self) -> float:
        """Share of the peak learning rates for the next step."""
        return learning_rates(self.config, self.total_steps)(self.progress.step)

    @property
    def steps_per_epoch(self) -> int:
        return self.schedule.steps(self.schedule.plan(self.progress.cursor.epoch))

    @property
    def codebooks(self) -> int:
        return self.model.config.audio_num_codebooks

    @property
    def epochs_done(self) -> float:
        """Passes over the data so far."""
        cursor = self.progress.cursor
        return cursor.epoch + cursor.pack / len(self.schedule.plan(cursor.epoch))

    @property
    def special_ids(self) -> SpecialIds:
        return self.loader.special_ids

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the model has the averaged weights, if an average is kept."""
        return self.ema.applied() if self.ema else contextlib.nullcontext()

    @contextlib.contextmanager
    def judged(self, *, base: bool) -> Iterator[None]:
        """Within the block the model is what is judged, without dropout: the base model alone, or what has trained."""
        with base_only(self.peft_model) if base else self.averaged(), evaluating(self.peft_model):
            yield

    def look(self, batch: Batch, look: Callable[..., Any]) -> Any:
        """What a function of model and batch says; all ranks together."""
        return self.module(batch, batch.flat, look)

    def window(self, began: Mark | None = None) -> Window:
        """An empty one, from a mark or from now on."""
        return Window.empty(self.codebooks, self.place.device, began)


def take_batches(run: Run, window: Window) -> tuple[list[Batch], list[float]]:
    """The micro-batches of one step, and their label and pair counts; the time waited for them is counted."""
    with window.waits.counted():
        batches = [next(run.loader) for _ in range(run.config.gradient_accumulation_steps)]
    counts = torch.zeros(2 + run.codebooks, dtype=torch.int64)
    for batch in batches:
        counts += torch.cat([batch["label_counts"], batch["pairs"]])
        window.positions += batch.positions * batch.weight
        window.audio_rows += sum(batch.audio_lengths) * batch.weight
        window.squares += sum(length**2 for length in batch.lengths) * batch.weight
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
    label_weights = run.loss.per_label(torch.tensor(counts)) * run.place.world.size
    label_weights = label_weights.to(run.place.device, non_blocking=True)  # else the host would wait for the device
    losses: list[torch.Tensor] = []
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        with syncing(run.module, last), naming_memory(batch, run.place.device):
            parts: LossParts = run.module(batch, label_weights)
            parts.total.backward()
        window.add(parts, only_finite=True)
        losses.append(parts.total.detach())
    if watch:
        watch.see_gradients()
    norm = whole(nn.utils.clip_grad_norm_(run.parameters.values(), run.config.max_grad_norm or math.inf))
    finite = torch.isfinite(torch.stack([norm, *losses]))
    run.bad.watch(run.progress.step + 1, batches, finite)
    set_rates(run.optimizer, run.rate_share)
    update(run, ~finite[0])
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema:
        run.ema.update()
    run.progress.step += 1
    run.progress.cursor = run.schedule.after(run.progress.cursor)
    return norm


def update(run: Run, skip: torch.Tensor) -> None:
    """Let the optimizer step, unless `skip` says that the gradient is not finite."""
    if isinstance(run.module, FSDPModule):
        if not skip:  # its kernel takes no such flag for sharded weights, so the host waits
            run.optimizer.step()
        return
    run.optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
    run.optimizer.found_inf = skip.float()  # pyright: ignore[reportAttributeAccessIssue]
    run.optimizer.step()


def syncing(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Gradients are sent once an optimizer step, at its last micro-step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    return contextlib.nullcontext() if last or not isinstance(module, DistributedDataParallel) else module.no_sync()
