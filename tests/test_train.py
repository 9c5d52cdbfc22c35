"""The trainer end to end on the toy: freezing, hand-over between stages, ranks, the written adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.data.batch import collate
from higgs_tune.train.loop import train
from higgs_tune.train.model.forward import hidden_states
from higgs_tune.train.model.load import HiggsAudioModel, load_model
from higgs_tune.train.model.lora import AUDIO_PARAMETER, add_lora
from higgs_tune.train.model.loss import LossOptions, pack_loss
from higgs_tune.train.model.reference import boson_inputs
from higgs_tune.train.resolve import trainable_options
from peft import PeftModel
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaRMSNorm

OPTIONS: dict[str, Any] = {
    "tokens_per_pack": 2048,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "dataloader_num_workers": 0,
    "eval_steps": 0,
    "save_steps": 0,
}


def run(shards: ShardSet, model_path: Path, out: Path, stage: str, **options: Any) -> list[dict[str, Any]]:
    """Train in this process; return the lines of metrics.jsonl."""
    paths = {"model_path": model_path, "train_data_dir": (shards.location,), "output_dir": out}
    train(TrainConfig.of(training_stage=stage, **paths, **(OPTIONS | options)))  # pyright: ignore[reportArgumentType]
    return metrics_of(out)


def metrics_of(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def stage1(shards: ShardSet, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stage1") / "out"
    run(shards, toy / "model", out, "stage1", max_steps=6)
    return out


@pytest.fixture(scope="module")
def stage2(shards: ShardSet, stage1: Path) -> Path:
    out = stage1.parent / "stage2"
    run(shards, stage1, out, "stage2", max_steps=6)
    return out


def load(path: Path) -> HiggsAudioModel:
    return load_model(path, device=torch.device("cpu"), dtype=torch.float32).model


def test_stage1_moves_every_text_target_and_no_audio_parameter(toy: Path, stage1: Path) -> None:
    tuned = PeftModel.from_pretrained(HiggsAudioModel.from_pretrained(toy / "model"), str(stage1))  # pyright: ignore
    base = dict(load(toy / "model").named_parameters())
    merged = dict(tuned.merge_and_unload().named_parameters())
    moved = {name for name, value in merged.items() if not torch.equal(value, base[name])}
    audio = {name for name in base if AUDIO_PARAMETER.search(name)}
    text_ffn, attention = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
    targets = {f"layers.{i}.mlp.{name}.weight" for i in range(3) for name in text_ffn}
    targets |= {f"layers.{i}.self_attn.{name}.weight" for i in range(3) for name in attention}
    assert len(audio) == 3 * 5 + 2  # three audio FFN weights and two norms a layer, the embeddings, the head
    assert not moved & audio
    assert moved == targets


def test_written_adapter_on_boson_gives_the_trainers_logits(
    toy: Path, stage2: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain PEFT on boson's own class and forward, against our forward with the same adapter.

    In float64: six steps at a high rate can leave rows in which float32 loses three digits, in either forward.
    """

    def norm(self: Any, x_BLH: torch.Tensor) -> torch.Tensor:
        """LlamaRMSNorm without its cast to float32."""
        return self.weight * x_BLH * torch.rsqrt(x_BLH.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    tuned = PeftModel.from_pretrained(HiggsAudioModel.from_pretrained(toy / "model"), str(stage2))  # pyright: ignore
    samples, ids = [shards.read(row) for row in range(3)], shards.special_ids
    pad = tuned.config.pad_token_id  # pyright: ignore
    model = load(toy / "model")
    config = TrainConfig("stage2", stage2, (shards.location,), Path())
    add_lora(model, trainable_options(config, stage2), "stage2", toy / "model", stage2)
    model.double()
    with torch.no_grad():
        reference = tuned.double().eval()(**boson_inputs(samples, ids, pad))
        batch = collate(samples, 0.0, ids)
        hidden = model.norm(hidden_states(model, batch))[batch["to_sequence"].long()]
        logits = model.audio_decoder_proj.text_lm_head(hidden)
    expected = torch.cat([reference.logits[i, :length] for i, length in enumerate(batch.lengths)])
    assert logits.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=0)
    untuned = load(toy / "model").double()
    with torch.no_grad():
        base_hidden = untuned.norm(hidden_states(untuned, batch))[batch["to_sequence"].long()]
    assert (base_hidden - hidden).abs().max() > 0.1  # the adapter does something


def test_stage2_begins_with_stage1s_loss(shards: ShardSet, toy: Path, stage1: Path, stage2: Path) -> None:
    """Its first step is on the first pack; stage 1's adapter, loaded by plain PEFT, has the same losses there."""
    tuned = PeftModel.from_pretrained(HiggsAudioModel.from_pretrained(toy / "model"), str(stage1))  # pyright: ignore
    first = metrics_of(stage2)[0]
    from higgs_tune.train.data.sampler import Schedule
    from higgs_tune.train.dist.context import World

    schedule = Schedule([shards], tokens_per_pack=2048, seed=42, accumulation=1, world=World(0, 1, 0, 1))
    samples = [shards.read(row) for row in schedule.plan(0).pack(0)]
    pad = tuned.config.pad_token_id  # pyright: ignore
    inputs = boson_inputs(samples, shards.special_ids, pad)
    with torch.no_grad():
        out = tuned.eval()(**inputs)
    cross_entropy = torch.nn.functional.cross_entropy
    text = cross_entropy(out.logits[:, :-1].flatten(0, 1), out.expanded_labels[:, 1:].flatten())
    books = [cross_entropy(out.audio_logits[:-1, k], inputs["label_audio_ids"][k, 1:]) for k in range(8)]
    assert first["text_loss"] == pytest.approx(float(text), abs=2e-5)
    assert first["audio_loss_per_codebook"] == pytest.approx([float(book) for book in books], abs=2e-5)
    assert first["audio_loss"] == pytest.approx(float(torch.stack(books).mean()), abs=2e-5)


def test_stage2_continues_stage1s_modules_and_adds_audio(stage1: Path, stage2: Path) -> None:
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (stage1, stage2))
    joined = after.keys() - before.keys()
    assert before.keys() < after.keys()
    assert all("audio_mlp" in name for name in joined)
    assert any(after[name].any() for name in joined if "lora_B" in name)


@pytest.fixture(scope="module")
def one_process(shards: ShardSet, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "out"
    run(shards, toy / "model", out, "single", max_steps=5, tokens_per_pack=1024, gradient_accumulation_steps=2)
    return out


def test_two_processes_equal_one(shards: ShardSet, toy: Path, one_process: Path, tmp_path: Path) -> None:
    """The same packs, once on two ranks, once accumulated on one: same losses, same weights."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = {"training_stage": "single", "model_path": toy / "model", "train_data_dir": shards.location}
    flags |= {"output_dir": tmp_path, "max_steps": 5, **OPTIONS, "tokens_per_pack": 1024}
    command = [*launch, "-m", "higgs_tune.train", *(f"--{name}={value}" for name, value in flags.items())]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert_same_run(one_process, tmp_path)


def assert_same_run(one: Path, other: Path) -> None:
    a, b = metrics_of(one), metrics_of(other)
    assert len(a) == len(b) == 5
    for x, y in zip(a, b, strict=True):
        for name in ("loss", "text_loss", "audio_loss", "grad_norm"):
            assert x[name] == pytest.approx(y[name], rel=1e-5), (x["step"], name)
        assert (x["text_labels"], x["audio_labels"]) == (y["text_labels"], y["audio_labels"])
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-5, rtol=0)


@pytest.mark.fast
def test_packing_does_not_change_the_step(shards: ShardSet, toy: Path, one_process: Path) -> None:
    """One step over all samples of the first two packs equals a loop of single samples with the same weighting."""
    from higgs_tune.train.data.sampler import Schedule
    from higgs_tune.train.dist.context import World

    schedule = Schedule([shards], tokens_per_pack=1024, seed=42, accumulation=2, world=World(0, 1, 0, 1))
    rows = np.concatenate([schedule.plan(0).pack(i) for i in range(2)])
    model = load(toy / "model")
    singles = [collate([shards.read(int(row))], 0.0, shards.special_ids) for row in rows]
    options = LossOptions()
    counts = torch.stack([torch.cat([batch["label_counts"], batch["pairs"]]) for batch in singles]).sum(0).float()
    weights = options.per_label(counts)
    with torch.no_grad():
        total = sum(
            float(pack_loss(model, hidden_states(model, batch), batch, weights, options).total) for batch in singles
        )
    assert metrics_of(one_process)[0]["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_path": Path("/nowhere")}, "no checkpoint here"),
        ({"train_data_dir": ("/nowhere",)}, "no shard set here"),
        ({"tokens_per_pack": 64}, "longer than a pack"),
        ({"lora_preset": "text_only", "lora_target_modules": "x"}, "lora_preset"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ],
)
def test_user_errors(shards: ShardSet, toy: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    paths = {"model_path": toy / "model", "train_data_dir": (shards.location,), "output_dir": tmp_path}
    options: dict[str, Any] = {**paths, **OPTIONS, **change}
    with pytest.raises(UserError, match=message):
        train(TrainConfig.of(training_stage="stage1", **options))


def test_output_folder_with_a_run_is_refused(shards: ShardSet, toy: Path, stage1: Path) -> None:
    with pytest.raises(UserError, match="holds a run already"):
        run(shards, toy / "model", stage1, "stage1", max_steps=1)


def test_exit_code_and_message(shards: ShardSet, toy: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "higgs_tune.train",
        "--training_stage",
        "stage1",
        "--model_path",
        str(toy / "codec"),
    ]
    command += ["--train_data_dir", str(shards.folder), "--output_dir", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 2
    assert result.stderr.startswith("error: not a Higgs Audio v2 checkpoint")
    assert "Traceback" not in result.stderr
