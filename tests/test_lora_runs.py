"""Whatever LoRA targets trains: every linear layer against boson's forward, and runs on two ranks of every kind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.samples import random_sample
from helpers.tiny import ids_of, metrics_of, tiny_config, train_flags, write_set
from higgs_tune.train.model.adapter import PREFIX
from higgs_tune.train.model.forward import ExecOptions, label_states
from higgs_tune.train.model.lora import TrainableOptions, add_lora, trainable
from higgs_tune.train.model.loss import LossOptions, pack_loss
from higgs_tune.train.model.reference import reference_loss
from higgs_tune.train.toy import make_model, tower_changes
from safetensors.torch import load_file
from test_forward import Case, make_case
from torch import nn
from transformers import PreTrainedTokenizerBase


@pytest.fixture
def case(toy_tokenizer: PreTrainedTokenizerBase) -> Case:
    """A model with every kind of linear layer that the architecture has."""
    return make_case(toy_tokenizer, "all dual", attention=True, tower=True, projector=True)


def gradients(case: Case, run: Any) -> dict[str, torch.Tensor]:
    """The loss of `run()`, and the gradient of everything that trains."""
    total = run().total
    total.backward()
    found = {name: p.grad for name, p in trainable(case.model).items() if p.grad is not None}
    case.model.zero_grad(set_to_none=True)
    return found | {"loss": total.detach()}


@pytest.mark.fast
@pytest.mark.parametrize("dora", [False, True])
def test_lora_on_every_linear_layer_trains_as_in_bosons_forward(case: Case, dora: bool, tmp_path: Path) -> None:
    layers = {name for name, module in case.model.named_modules() if isinstance(module, nn.Linear)}
    options = TrainableOptions(r=2, alpha=4, dora=dora, pattern=".*", features="mel")
    add_lora(case.model, options, "single", tmp_path, None).eval()
    torch.manual_seed(0)
    for name, parameter in case.model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.05)
    loss, batch = LossOptions(audio=2.0, codebooks=(1, 2, 1, 1, 1, 1, 1, 3), smoothing=0.1), case.batch()
    weights = loss.per_label(torch.cat([batch["label_counts"], batch["pairs"]]).float())
    expected = gradients(case, lambda: reference_loss(case.model, case.boson(), weights, loss))
    for plain in (False, True):

        def packed(plain: bool = plain) -> Any:
            states = label_states(case.model, batch, ExecOptions(plain=plain))
            return pack_loss(case.model, states, batch, weights, loss, at_labels=True)

        got = gradients(case, packed)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert float(value.abs().max()) > 0, name
            torch.testing.assert_close(got[name], value, atol=1e-6, rtol=2e-3, msg=name)
    assert {name.partition(".lora_A")[0] for name in expected if ".lora_A" in name} == layers
    empty = case.batch([])  # a rank may get a pack without labels; DDP still waits for every gradient
    nothing = gradients(case, lambda: pack_loss(case.model, label_states(case.model, empty), empty, weights, loss,
                                                at_labels=True))  # fmt: skip
    assert nothing.keys() == expected.keys()


# features of the set, stage, options; each runs on two ranks
RUNS: dict[str, tuple[str, str, dict[str, object]]] = {
    "none": ("none", "single", {}),
    "mel": ("mel", "single", {}),
    "encoder": ("encoder", "single", {}),
    "encoder, stage 1": ("encoder", "stage1", {}),
    "mel, tower by LoRA": ("mel", "single", {"lora_target_modules": r"audio_tower\..*|audio_encoder_proj\.linear"}),
    "encoder, projector by LoRA": ("encoder", "single", {"lora_target_modules": r"audio_encoder_proj\.linear"}),
    "encoder, projector in full": ("encoder", "single", {"train_audio_encoder_proj": True}),
    "heads by LoRA": ("none", "single", {"lora_target_modules": r".*_lm_head"}),
    "every layer, DoRA": ("none", "single", {"lora_target_modules": r".*", "use_dora": True}),
    "heads in full, no text loss": ("none", "single", {"train_heads": True, "text_loss_weight": 0}),
    "norms and embeddings in full": ("none", "single", {"train_norms": True, "train_text_embeddings": True}),
    "norms and embeddings in full, stage 1": ("none", "stage1", {"train_norms": True, "train_text_embeddings": True}),
    "heads and projector by LoRA": ("encoder", "single", {"lora_extra": ("heads", "projector")}),
    "audio head by LoRA, no text loss": ("none", "single", {"lora_target_modules": r".*audio_lm_head",
                                                            "text_loss_weight": 0}),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerBase) -> Path:
    """Two steps of every run, on two ranks; every second sample has no reference, so no features."""
    folder, commands = tmp_path_factory.mktemp("runs"), []
    for features in ("none", "mel", "encoder"):
        model = folder / f"model-{features}"
        config = tiny_config(toy_tokenizer, **({} if features == "none" else tower_changes()))
        make_model(config, 0).save_pretrained(model)
        toy_tokenizer.save_pretrained(model)
        ids, rng = ids_of(model), np.random.default_rng(0)
        bins = {"none": 0, "mel": config.audio_encoder_config.num_mel_bins}.get(
            features, config.audio_encoder_config.d_model
        )
        samples = [random_sample(f"s{i}", rng, toy_tokenizer, ids, mel_bins=bins, frames=(3, 8)) for i in range(6)]
        write_set(folder / f"data-{features}", samples, model, features=features)
    steady = {"max_steps": 2, "learning_rate": 1e-2, "warmup_steps": 0, "tokens_per_pack": 256, "save_steps": 0}
    for name, (features, stage, options) in RUNS.items():
        paths = folder / f"model-{features}", folder / f"data-{features}", folder / name
        commands.append([2, train_flags(stage, *paths, **steady, **options)])
    script = Path(__file__).parent / "helpers" / "launch.py"
    command = [sys.executable, str(script), json.dumps(commands)]
    done = subprocess.run(command, timeout=600, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_train_what_is_targeted(name: str, runs: Path) -> None:
    """Every saved tensor has moved, and none is the tower's unless it was asked for."""
    assert len(metrics_of(runs / name)) == 2
    features, _, options = RUNS[name]
    saved, start = load_file(runs / name / "adapter_model.safetensors"), {}
    if "in full" in name:
        start = load_file(runs / f"model-{features}" / "model.safetensors")
    still = [
        key
        for key, value in saved.items()
        if ".lora_A" not in key and torch.equal(value, start.get(key.removeprefix(PREFIX), torch.zeros_like(value)))
    ]
    last_text_ffn = r"layers\.1\.mlp\." if options.get("text_loss_weight") == 0 else r"$^"
    assert not [key for key in still if not re.search(last_text_ffn, key)]
    assert any("audio_tower" in key for key in saved) == ("tower" in name)
    assert any("text_lm_head" in key for key in saved) == (
        name in ("heads by LoRA", "every layer, DoRA", "heads and projector by LoRA")
    )
