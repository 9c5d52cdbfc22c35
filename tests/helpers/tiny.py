"""A tiny checkpoint and shard sets for it, in a second or two: random texts and codes, no codec."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from helpers.samples import random_sample
from higgs_tune.preprocess.checkpoints.checkpoint import describe_checkpoint, read_config, special_ids
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.shards.split import ValidationSplit
from higgs_tune.shards.writer import SetWriter
from higgs_tune.train.__main__ import main
from higgs_tune.train.data.batch import Batch, collate
from higgs_tune.train.model.forward import hidden_states
from higgs_tune.train.model.load import HiggsAudioConfig, HiggsAudioModel
from higgs_tune.train.model.loss import LossOptions, LossParts, pack_loss
from higgs_tune.train.toy import make_model, model_config
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2}
CHANGES = {"audio_dual_ffn_layers": [0, 1], "audio_ffn_hidden_size": 64, "audio_ffn_intermediate_size": 96}


def tiny_config(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> HiggsAudioConfig:
    """The toy's config with two narrow layers."""
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    config = model_config(tokenizer, **(CHANGES | changes))
    for name, value in SIZES.items():
        setattr(config.text_config, name, value)
    config._attn_implementation = config.audio_encoder_config._attn_implementation = "sdpa"
    return config


def write_checkpoint(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, **changes: Any
) -> HiggsAudioModel:
    """A random model in Boson's layout, with its tokenizer."""
    model = make_model(tiny_config(tokenizer, **changes), seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def ids_of(model: Path) -> SpecialIds:
    """The special ids of a checkpoint."""
    return special_ids(read_config(model), model)


def write_set(folder: Path, samples: Sequence[Sample], model: Path, *, features: str = "none") -> Path:
    """A shard set of some samples, made for a checkpoint."""
    writer = SetWriter(folder, ids_of(model), ValidationSplit(0.0), features=features)
    writer.begin()
    writer.write(0, samples, [])
    writer.finish(1, {"model": describe_checkpoint(model), "features": {"whisper": features}})
    return folder


def loss_of(model: HiggsAudioModel, batch: Batch, options: LossOptions | None = None) -> LossParts:
    """The packed loss of one batch that is a whole step."""
    options = options or LossOptions()
    counts = torch.cat([batch["label_counts"], batch["pairs"]]).float()
    return pack_loss(model, hidden_states(model, batch), batch, options.per_label(counts), options)


def overfit(model: HiggsAudioModel, samples: Sequence[Sample], ids: SpecialIds, *, steps: int) -> float:
    """Train every weight on the same batch; returns the last loss."""
    batch, last = collate(samples, 0.0, ids), float("inf")
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        parts = loss_of(model, batch)
        optimizer.zero_grad()
        parts.total.backward()
        optimizer.step()
        last = float(parts.total.detach())
    model.requires_grad_(False)
    return last


def train_flags(stage: str, model: Path, data: Path, out: Path, **options: object) -> list[str]:
    """Arguments of `python -m higgs_tune.train`; True stands for a bare flag, a tuple for several values."""
    given: dict[str, object] = {"training_stage": stage, "model_path": model, "train_data_dir": data, "output_dir": out}
    given |= {"max_steps": 1, "tokens_per_pack": 1024, "logging_steps": 1, "dataloader_num_workers": 0} | options
    flags: list[str] = []
    for name, value in given.items():
        values = () if value is True else value if isinstance(value, tuple) else (value,)
        flags += [f"--{name}", *map(str, values)]
    return flags


def run_train(stage: str, model: Path, data: Path, out: Path, **options: object) -> list[dict[str, Any]]:
    """The training command, in this process; returns the lines of metrics.jsonl.

    Raises:
        SystemExit: with code 2 where the command refuses.
    """
    with mock.patch.object(sys, "argv", ["train", *train_flags(stage, model, data, out, **options)]):
        main()
    return metrics_of(out)


def run_on_one_sample(
    stage: str, folder: Path, tokenizer: PreTrainedTokenizerBase, **options: object
) -> list[dict[str, Any]]:
    """`run_train` on a model and a set of one sample, made in a folder; OUT is `folder/out`."""
    model = folder / "model"
    write_checkpoint(model, tokenizer)
    sample = random_sample("s", np.random.default_rng(0), tokenizer, ids_of(model))
    return run_train(stage, model, write_set(folder / "data", [sample], model), folder / "out", **options)


def metrics_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
