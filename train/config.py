"""Options of the trainer: one frozen dataclass, validated once, saved resolved as config.yaml."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..shards.errors import UserError
from ..shards.remote import Cache
from .lora import PRESETS


@dataclass(frozen=True)
class TrainConfig:
    """Train LoRA on Higgs Audio v2: stage1 (text), then stage2 (text and audio) from stage 1's output."""

    training_stage: Literal["stage1", "stage2", "single"]
    """stage1: text loss only, every audio parameter frozen. stage2: both losses. single: stage2 without stage1."""
    model_path: Path
    """Base checkpoint folder, or the output folder of an earlier stage."""
    train_data_dir: tuple[str, ...]
    """Shard sets to train on: folders, or URLs that fsspec knows (s3://, hf://, …)."""
    output_dir: Path
    """Folder that receives config, metrics and the adapter."""
    overwrite_output_dir: bool = False
    """Remove an earlier run's files from the output folder first."""

    learning_rate: float = 2e-4
    """Peak learning rate."""
    num_train_epochs: float = 1.0
    """Epochs to train for, unless --max_steps is given."""
    max_steps: int = -1
    """Optimizer steps to train for; -1: by --num_train_epochs."""
    gradient_accumulation_steps: int = 1
    """Packs a rank for each optimizer step."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; by default 3 % of all steps."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    tokens_per_pack: int = 8192
    """Positions a pack holds at most; the batch of one rank and micro-step."""
    text_loss_weight: float = 1.0
    """Weight of the text loss."""
    audio_loss_weight: float = 1.0
    """Weight of the audio loss; without effect in stage1."""

    lora_r: int | None = None
    """Rank of LoRA; by default 16, or that of the adapter that is continued."""
    lora_alpha: float | None = None
    """Scaling of LoRA is alpha / r; by default 2 r, or that of the adapter that is continued."""
    lora_dropout: float = 0.0
    """Dropout of LoRA's input."""
    lora_preset: str | None = None
    """comprehensive, text_only, audio_focused or attention_only; by default text_only in stage1, else comprehensive."""

    mix_weights: tuple[float, ...] | None = None
    """Share of packs from each set; an epoch is then one pass over the first. By default all are packed together."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """What to do about a damaged sample: stop the run, or leave it out, counted and logged."""
    max_bad_samples: int = 100
    """Damaged samples that a rank skips before it stops all the same."""
    cache_dir: Path | None = None
    """Where files of remote sets are kept; by default $HIGGS_TUNE_CACHE, else ~/.cache/higgs-tune."""
    cache_max_gb: float | None = None
    """Size of that cache in GB; by default without limit."""
    dataloader_num_workers: int | None = None
    """Loader processes of each rank; by default up to 4, as the machine's cores allow."""
    dataloader_start_method: Literal["fork", "spawn"] = "fork"
    """How loader processes are started."""
    logging_steps: int = 10
    """Steps between two lines of metrics.jsonl."""
    seed: int = 42
    """Seed of the data order and of new weights."""
    debug: bool = False
    """Show tracebacks of user errors."""

    def __post_init__(self) -> None:
        checks = [
            ("learning_rate", self.learning_rate > 0, "more than 0"),
            ("num_train_epochs", self.num_train_epochs > 0, "more than 0"),
            ("max_steps", self.max_steps == -1 or self.max_steps > 0, "-1, or more than 0"),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "at least 1"),
            ("warmup_steps", self.warmup_steps is None or self.warmup_steps >= 0, "at least 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("max_grad_norm", self.max_grad_norm >= 0, "at least 0"),
            ("tokens_per_pack", self.tokens_per_pack >= 1, "at least 1"),
            ("text_loss_weight", self.text_loss_weight >= 0, "at least 0"),
            ("audio_loss_weight", self.audio_loss_weight >= 0, "at least 0"),
            ("lora_r", self.lora_r is None or self.lora_r >= 1, "at least 1"),
            ("lora_alpha", self.lora_alpha is None or self.lora_alpha > 0, "more than 0"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "0 to 1"),
            ("lora_preset", self.lora_preset is None or self.lora_preset in PRESETS, ", ".join(PRESETS)),
            ("train_data_dir", len(self.train_data_dir) >= 1, "at least one"),
            ("mix_weights", self._good_weights(), "a weight above 0 for each --train_data_dir"),
            ("max_bad_samples", self.max_bad_samples >= 0, "at least 0"),
            ("cache_max_gb", self.cache_max_gb is None or self.cache_max_gb > 0, "more than 0"),
            (
                "dataloader_num_workers",
                self.dataloader_num_workers is None or self.dataloader_num_workers >= 0,
                "at least 0",
            ),
            ("logging_steps", self.logging_steps >= 1, "at least 1"),
        ]
        for name, good, expected in checks:
            if not good:
                raise UserError(f"--{name} is out of range", expected=expected, got=getattr(self, name))

    def _good_weights(self) -> bool:
        weights = self.mix_weights
        return weights is None or (len(weights) == len(self.train_data_dir) and min(weights) > 0)

    def cache(self) -> Cache:
        """Where files of remote sets are kept."""
        default = Cache.default(None if self.cache_max_gb is None else int(self.cache_max_gb * 1e9))
        return default if self.cache_dir is None else Cache(self.cache_dir, default.max_bytes)

    def loader_workers(self, local_world: int) -> int:
        """Loader processes of one rank on this machine."""
        if self.dataloader_num_workers is not None:
            return self.dataloader_num_workers
        return max(0, min(4, (os.cpu_count() or 1) // local_world - 1))
