"""The state of a run: the model, its optimizer, its data, how far it has come, and sums since the last report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from higgs_tune.preprocess.checkpoints.training_record import TrainingRecord
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.data.batch import Batch
from higgs_tune.train.data.loader import Loader
from higgs_tune.train.data.sampler import Cursor, Schedule
from higgs_tune.train.dist.context import DistContext
from higgs_tune.train.dist.device_timing import Stopwatch, Timestamp
from higgs_tune.train.dist.faults import NonFiniteSteps
from higgs_tune.train.model.forward import ExecOptions
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.lora import base_only, evaluating
from higgs_tune.train.model.loss import LossOptions, LossParts, LossSums
from higgs_tune.train.model.whisper_tower import WhisperTower
from higgs_tune.train.optim import Ema
from torch import nn
from torch.optim import Optimizer


@dataclass
class StepStats:
    """Sums of this rank since the last report: losses on the device, counts on the host.

    packed_sums: a packed `LossSums`. began: the end of the previous report's steps. waits: time spent waiting for
    batches. pauses: time spent on validation, samples and saves. audio_rows: audio positions. squares: sum of squared
    sample lengths, for the FLOPs of attention. audio_s: seconds of audio. windows: that the Whisper tower took.
    """

    packed_sums: torch.Tensor
    began: Timestamp
    waits: Stopwatch
    pauses: Stopwatch
    steps: int = 0
    positions: int = 0
    samples: int = 0
    audio_rows: int = 0
    squares: int = 0
    audio_s: float = 0.0
    windows: int = 0

    @staticmethod
    def empty(codebooks: int, device: torch.device, began: Timestamp | None = None) -> StepStats:
        return StepStats(
            LossSums.zeros(codebooks, device), began or Timestamp(device), Stopwatch(device), Stopwatch(device)
        )

    def add_batch(self, batch: Batch) -> None:
        """Count a pack's positions, samples and audio; a pack of weight 0 counts nothing."""
        self.positions += batch.positions * batch.weight
        self.audio_rows += sum(batch.audio_lengths) * batch.weight
        self.squares += sum(length**2 for length in batch.lengths) * batch.weight
        self.samples += len(batch.keys) * batch.weight
        self.audio_s += batch.seconds * batch.weight
        self.windows += batch.windows * batch.weight

    def add_loss(self, parts: LossParts, *, only_finite: bool) -> None:
        """Add a pack's sums.

        Args:
            only_finite: leave the pack out if its loss is not finite, because its step is then skipped.
        """
        packed = parts.sums.pack()
        self.packed_sums += torch.where(torch.isfinite(parts.total), packed, 0.0) if only_finite else packed


@dataclass
class Progress:
    """How far a run has come.

    step: optimizer steps done. cursor: the next pack. best_value, best_step: the best validation. stale: validations
    since the best one. base_metrics: of the base model, by `NAME:metric`.
    """

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    best_value: float | None = None
    best_step: int = 0
    stale: int = 0
    base_metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Run:
    """Everything that the training steps use.

    base: folder of the checkpoint that the run starts from.
    model: boson's model. peft_model: the same model with its adapters (`model` itself where every weight trains).
    tower: the Whisper tower that was attached to the base, if one was.
    module: `PackModel`, wrapped by DDP or FSDP where there are several ranks. parameters: those that train.
    record: what checkpoints say of the training data; only where this rank writes.
    """

    config: TrainConfig
    context: DistContext
    base: Path
    model: HiggsAudioModel
    peft_model: nn.Module
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer
    loss_options: LossOptions
    loader: Loader
    schedule: Schedule
    total_steps: int
    progress: Progress
    bad_steps: NonFiniteSteps
    ema: Ema | None = None
    tower: WhisperTower | None = None
    record: TrainingRecord | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.schedule.steps(self.schedule.plan(self.progress.cursor.epoch))

    @property
    def exec_options(self) -> ExecOptions:
        """How the layers run."""
        pack_model: Any = getattr(self.module, "module", self.module)  # within DDP
        return pack_model.exec_options

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

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the model has the moving average's weights, if an average is kept."""
        return self.ema.applied() if self.ema else contextlib.nullcontext()

    @contextlib.contextmanager
    def eval_mode(self, *, base: bool) -> Iterator[None]:
        """Within the block, evaluate the base, EMA or trained weights with dropout off.

        Args:
            base: the base model alone, without what has been trained.
        """
        weights = base_only(self.peft_model) if base else self.averaged_weights()
        with weights, evaluating(self.peft_model):
            yield

    def probe(self, batch: Batch, probe: Callable[..., Any]) -> Any:
        """What `probe(model, batch)` returns; all ranks call this together."""
        return self.module(batch, batch.flat, probe)

    def new_stats(self, began: Timestamp | None = None) -> StepStats:
        """Empty sums, counted from a mark or from now on."""
        return StepStats.empty(self.codebooks, self.context.device, began)
