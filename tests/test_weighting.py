"""The same data gives the same loss and gradients on 1, 2 and 4 processes, packed or not, accumulated or not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.samples import random_sample
from helpers.tiny import ids_of, loss_of, metrics_of, train_flags, write_checkpoint, write_set
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.train.data.batch import collate
from higgs_tune.train.model.forward import hidden_states
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.loss import LossOptions, pack_loss
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

SAMPLES, WHOLE, SINGLE, TWO = 8, 4096, 260, 500  # positions a pack: all samples, one each, about two each
# processes, positions a pack, packs a rank and step; every step is over the whole set
LAYOUTS = {
    "one pack": (1, WHOLE, 1),
    "single samples, accumulated": (1, SINGLE, SAMPLES),
    "pairs, accumulated past the end": (1, TWO, SAMPLES),
    "two processes, single samples": (2, SINGLE, SAMPLES // 2),
    "two processes, one pack": (2, WHOLE, 1),
    "four processes, single samples": (4, SINGLE, SAMPLES // 4),
    "four processes, pairs, past the end": (4, TWO, 2),
}


@dataclass(frozen=True)
class Runs:
    """A model, its samples, and the output folder of every layout."""

    model: HiggsAudioModel
    samples: list[Sample]
    ids: SpecialIds
    out: Path

    def metrics(self, layout: str) -> list[dict[str, Any]]:
        return metrics_of(self.out / layout)

    def adapter(self, layout: str) -> dict[str, torch.Tensor]:
        return load_file(self.out / layout / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerBase) -> Runs:
    """Two steps of every layout; samples of different lengths, some with masked turns, so that means differ."""
    folder, rng = tmp_path_factory.mktemp("weighting"), np.random.default_rng(0)
    model = write_checkpoint(folder / "model", toy_tokenizer)
    ids = ids_of(folder / "model")
    samples = [random_sample(f"s{i}", rng, toy_tokenizer, ids, frames=(3, 4 + 3 * i)) for i in range(SAMPLES - 1)]
    samples.append(random_sample("masked", rng, toy_tokenizer, ids, frames=(3, 9), turns=2, start_index=3))
    longest = max(collate([sample], 0.0, ids).positions for sample in samples)
    assert SINGLE / 2 < longest <= SINGLE
    data, commands = write_set(folder / "data", samples, folder / "model"), []
    options: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    options |= {"warmup_steps": 0, "label_smoothing": 0.1, "codebook_loss_weights": (3, 1, 1, 1, 1, 1, 1, 2)}
    options |= {"train_heads": True, "text_loss_weight": 0.7}
    for name, (size, tokens, accumulation) in LAYOUTS.items():
        spread = {"tokens_per_pack": tokens, "gradient_accumulation_steps": accumulation}
        commands.append(
            [size, train_flags("single", folder / "model", data, folder / name, **options, **spread)],
        )
    script = Path(__file__).parent / "helpers" / "launch.py"
    subprocess.run([sys.executable, str(script), json.dumps(commands)], check=True, timeout=600, capture_output=True)
    return Runs(model, samples, ids, folder)


@pytest.mark.fast
@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_the_step_does_not_depend_on_how_samples_are_spread(layout: str, runs: Runs) -> None:
    one, other = runs.metrics("one pack"), runs.metrics(layout)
    assert len(one) == len(other) == 2
    for a, b in zip(one, other, strict=True):
        for name in ("loss", "text_loss", "audio_loss", "eos_loss", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), name
        assert b["audio_loss_per_codebook"] == pytest.approx(a["audio_loss_per_codebook"], rel=1e-5)
        assert (a["text_labels"], a["audio_labels"]) == (b["text_labels"], b["audio_labels"])
    weights, expected = runs.adapter(layout), runs.adapter("one pack")
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0)


def test_layouts_are_what_they_say(runs: Runs) -> None:
    """Losses fall from the first step to the second, so that the comparison is of something."""
    for layout in LAYOUTS:
        first, second = runs.metrics(layout)
        assert second["loss"] < first["loss"] - 1e-3
    moved = [value.abs().max() for name, value in runs.adapter("one pack").items() if "lora_B" in name]
    assert min(moved) > 5e-4


def test_every_gradient_is_that_of_single_samples(runs: Runs) -> None:
    """The whole set as one pack against single samples added up, for every weight of the model."""
    options = LossOptions(text=0.7, audio=1.3, codebooks=(3, 1, 1, 1, 1, 1, 1, 2), smoothing=0.1)
    runs.model.requires_grad_(True)
    loss_of(runs.model, collate(runs.samples, 0.0, runs.ids), options).total.backward()
    whole = {name: p.grad.clone() for name, p in runs.model.named_parameters() if p.grad is not None}
    runs.model.zero_grad()
    batches = [collate([sample], 0.0, runs.ids) for sample in reversed(runs.samples)]
    counts = torch.stack([torch.cat([batch["label_counts"], batch["pairs"]]) for batch in batches]).sum(0).float()
    for batch in batches:
        hidden = hidden_states(runs.model, batch)
        pack_loss(runs.model, hidden, batch, options.per_label(counts), options).total.backward()
    assert len(whole) > 30
    for name, parameter in runs.model.named_parameters():
        if name in whole:
            assert parameter.grad is not None
            error, scale = float((parameter.grad - whole[name]).abs().max()), float(whole[name].abs().max())
            assert error <= 1e-5 * scale, name
    runs.model.zero_grad(set_to_none=True)
