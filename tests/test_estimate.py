"""--estimate: the sizes, amounts and memory of the run that it stands for, from config.json and manifests alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers.samples import random_sample
from helpers.tiny import ids_of, tiny_config, write_checkpoint
from higgs_tune.preprocess.checkpoints.hub import BASE_MODEL
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import expand
from higgs_tune.train import estimate
from higgs_tune.train.amount import amount_of
from higgs_tune.train.arguments import parse_arguments
from higgs_tune.train.build import build_run
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.data.batch import collate
from higgs_tune.train.dist.context import init_distributed
from higgs_tune.train.model.flops import Rows, model_flops
from higgs_tune.train.model.forward import Checkpointing, ExecOptions, label_states
from higgs_tune.train.model.fused_linear import stack_layer
from higgs_tune.train.model.gpus import GPUS, gpu_named, gpu_of_device
from higgs_tune.train.model.lora import TrainableOptions, add_lora
from higgs_tune.train.model.loss import LossOptions, pack_loss
from higgs_tune.train.model.memory import activation_bytes, largest_pack, state_bytes, working_bytes
from higgs_tune.train.resolve import resolve_inputs
from higgs_tune.train.toy import make_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerBase

LOSS = LossOptions()


def told(capfd: Any, *arguments: object) -> str:
    """What --estimate prints."""
    estimate.print_estimate(parse_arguments(["--estimate", *map(str, arguments)]))
    return capfd.readouterr().out


def manifest_alone(shards: ShardSet, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(Path(shards.location) / "manifest.json", folder)
    return folder


@pytest.mark.fast
def test_names_of_gpus() -> None:
    for text, name in {
        "h200": "H200", "H100": "H100", "h100-pcie": "H100 PCIe", "a100": "A100 80GB", "A100-40GB": "A100 40GB",
        "4090": "RTX 4090", "rtx4090": "RTX 4090", "RTX 4060 Ti": "RTX 4060 Ti 16GB", "3060": "RTX 3060 12GB",
        "a6000": "RTX A6000", "NVIDIA GeForce RTX 3090": "RTX 3090", "rtx-6000-ada": "RTX 6000 Ada",
    }.items():  # fmt: skip
        assert gpu_named(text).name == name
    for text in ("", "rtx", "40", "v100", "mi300x"):
        with pytest.raises(UserError, match="one of B200, H200"):
            gpu_named(text)
    for device, name in {
        "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 PCIe": "H100 PCIe", "NVIDIA H100 NVL": "H100 NVL",
        "NVIDIA A100-SXM4-40GB": "A100 80GB", "NVIDIA GeForce RTX 4090": "RTX 4090", "NVIDIA A10": "A10",
        "NVIDIA GeForce RTX 4060 Ti": "RTX 4060 Ti 16GB", "NVIDIA RTX A6000": "RTX A6000",
    }.items():  # fmt: skip
        found = gpu_of_device(device)
        assert found and found.name == name
    for device in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4080 SUPER", "NVIDIA A10G", "Tesla T4"):
        assert gpu_of_device(device) is None


@pytest.mark.fast
@pytest.mark.parametrize("config", sorted((ROOT / "examples" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_released_sizes_need_no_file_at_all(config: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = told(capfd, "--config", config, "--gpu", "h100")
    assert "5.8" in out.splitlines()[1] and "B parameters" in out
    size = 4.222 if "quantize_base" in config.read_text() else 11.543
    assert f"  weights that stay{size:>36} GB" in out
    assert "ESTIMATE: nobody has measured this GPU" in out and "1 h of target speech" in out
    at_revision = told(capfd, "--config", config, "--gpu", "h100", "--model_path", f"{BASE_MODEL}@main")
    assert at_revision == out


@pytest.mark.fast
def test_config_json_alone_of_either_layout(toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capfd: Any) -> None:
    write_checkpoint(tmp_path / "whole", toy_tokenizer)
    bare, native = tmp_path / "bare", tmp_path / "native"
    bare.mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", bare)
    native.mkdir()
    text = json.loads((bare / "config.json").read_text())["text_config"]
    sizes = {name: text[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads", "head_dim")}  # fmt: skip
    sizes |= {"model_type": "higgs_audio_v2", "num_codebooks": 8, "rope_parameters": {"rope_theta": 5e5}}
    (native / "config.json").write_text(json.dumps(sizes))
    outs = [told(capfd, "--model_path", folder, "--gpu", "a10", "--hours", 50) for folder in (tmp_path / "whole", bare)]
    assert outs[0] == outs[1] and "50 h of target speech" in outs[0]
    assert (
        told(capfd, "--model_path", native, "--gpu", "a10", "--hours", 50).splitlines()[2:5]
        == (outs[0].splitlines()[2:5])
    )


@pytest.mark.fast
@pytest.mark.parametrize(("arguments", "message"), [
    (("--estimate",), "--estimate needs --gpu"),
    (("--estimate", "--gpu", "riva128"), "got riva128"),
    (("--estimate", "--gpu", "h200", "--model_path", "nowhere"), "no checkpoint here (nowhere)"),
    (("--estimate", "--gpu", "h200", "--train_data_dir", "nowhere"), "--hours N estimates without shards"),
    (("--estimate", "--gpu", "h200", "--hours", "0"), "--hours is out of range"),
    (("--training_stage", "single", "--model_path", "M", "--train_data_dir", "S", "--output_dir", "O", "--gpu", "h200"),
     "--gpu belong to --estimate"),
])  # fmt: skip
def test_mistakes_are_named(arguments: tuple[str, ...], message: str, capfd: Any) -> None:
    with pytest.raises(UserError) as error:
        estimate.print_estimate(parse_arguments(list(arguments)))
    assert message in str(error.value)


OPTIONS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "stage 1, rank 4": {"training_stage": "stage1", "lora_r": 4},
    "DoRA, heads, norms": {"use_dora": True, "lora_extra": ("heads",), "train_norms": True, "ema_decay": 0.9},
    "audio attention, heads in full": {"use_audio_out_self_attention": True, "train_heads": True},
    "in full": {"full_finetune": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_planned_model_is_that_of_the_run(
    options: dict[str, Any], toy: Path, shards: ShardSet, tmp_path: Path
) -> None:
    """Parameters, what trains, states, FLOPs and activations, as the loaded run has them."""
    given: dict[str, Any] = {"training_stage": "single", "model_path": toy / "model", "max_steps": 1}
    given |= {"train_data_dir": (shards.location,), "output_dir": tmp_path / "out", "dataloader_num_workers": 0}
    config = TrainConfig.of(**(given | options))
    context = init_distributed()
    run, _, _ = build_run(config, context, resolve_inputs(config, context), None)
    run.loader.close()
    planned, _ = estimate.plan_model(config, [shards.manifest])
    shapes = [
        {n: (p.shape, p.requires_grad) for n, p in m.named_parameters()} for m in (planned.peft_model, run.peft_model)
    ]
    assert shapes[0] == shapes[1]
    assert model_flops(planned.model, Rows.typical()) == model_flops(run.model, Rows.typical())
    nn.Module.to(planned.peft_model, dtype=torch.float32)  # as a CPU computes
    with_average = "ema_decay" in options
    assert state_bytes(planned.peft_model, with_average=with_average) == state_bytes(
        run.peft_model, with_average=with_average
    )
    assert activation_bytes(planned.model) == activation_bytes(run.model)
    moments = sum(p.numel() * 8 for p in run.parameters.values())
    assert planned.states.moments == moments and planned.states.gradients == moments / 2


@pytest.mark.fast
def test_amounts_are_those_of_the_set(toy: Path, shards: ShardSet, tmp_path: Path, capfd: Any) -> None:
    """From its manifest alone, within a few percent of what the samples hold."""
    folder = manifest_alone(shards, tmp_path / "set")
    common = ("--model_path", toy / "model", "--train_data_dir", folder, "--gpu", "h200")
    config = parse_arguments(["--estimate", *map(str, common)])
    amount = amount_of(config, [shards.manifest], "none")
    samples = [shards.read(row) for row in shards.rows_of(validation=False).tolist()]
    whole = expand(samples, shards.special_ids)
    assert amount.samples == pytest.approx(len(samples))
    wanted = {"positions": whole.lengths.sum(), "audio": len(whole.audio_at), "text": len(whole.text_at),
              "text_labels": len(whole.text_labels), "audio_labels": (whole.audio_labels_KB[0] >= 0).sum(),
              "squares": (whole.lengths**2).sum()}  # fmt: skip
    for name, value in wanted.items():
        assert getattr(amount.rows, name) == pytest.approx(float(value), rel=0.08), name
    out = told(capfd, *common, "--gpus", 2, "--tokens_per_pack", 1024, "--num_train_epochs", 3)
    packs = amount.packs(1024)
    assert f"{packs} packs" in out and f"run: {3 * -(-packs // 2)} steps" in out
    half = amount_of(
        parse_arguments(["--estimate", *map(str, common), "--val_fraction", "0.5"]), [shards.manifest], "none"
    )
    assert half.samples == pytest.approx(len(shards) / 2)
    both = ["--train_data_dir", str(folder), str(folder), "--mix_weights", "1", "3"]
    twice = parse_arguments(["--estimate", "--gpu", "h200", *both])
    mixed = amount_of(twice, [shards.manifest] * 2, "none")
    assert mixed.rows.positions == pytest.approx(4 * amount.rows.positions)


@pytest.mark.fast
def test_a_measured_gpu_is_no_estimate(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its share of the peak gives the speed: 989 TFLOP/s at half the peak, by FLOPs a position."""
    measured = [replace(gpu, measured_mfu=0.5) if gpu.name == "H200" else gpu for gpu in GPUS]
    monkeypatch.setattr("higgs_tune.train.model.gpus.GPUS", measured)
    out = told(capfd, "--gpu", "h200", "--hours", 100, "--tokens_per_pack", 16384)
    assert "ESTIMATE" not in out and "50% of the peak" in out
    for other in (("--quantize_base", "nf4"), ("--activation_checkpointing", "full"), ("--tokens_per_pack", 8192)):
        unlike = told(capfd, "--gpu", "h200", "--hours", 100, "--tokens_per_pack", 16384, *other)
        assert "ESTIMATE: nobody has measured this GPU, but in bfloat16 with packs of 16,384" in unlike
    (speed,) = [line for line in out.splitlines() if line.startswith("speed: ")]
    rate, flops = float(speed.split()[1].replace(",", "")), float(speed.split("; ")[1].split()[0])
    assert rate * flops * 1e9 == pytest.approx(0.5 * 989e12, rel=0.01)


@pytest.mark.fast
def test_the_largest_pack_is_the_largest_that_fits() -> None:
    config = parse_arguments(["--estimate", "--gpu", "4090"])
    planned, _ = estimate.plan_model(config, [])
    free, modes = 10e9, estimate.MODES
    found = [largest_pack(planned.model, mode, free) for mode in modes]
    for mode, positions in zip(modes, found, strict=True):
        need = positions * activation_bytes(planned.model, mode) + working_bytes(planned.model, positions, mode)
        assert 0.95 * 0.8 * free < need <= 0.8 * free
    assert found == sorted(found)
    assert largest_pack(planned.model, "full", -1e9) == 0


@pytest.mark.parametrize(("mode", "options"), [
    ("none", {}), ("selective", {}), ("full", {}), ("full", {"heads": True}),
    ("full", {"extra": ("heads",), "dora": True}), ("full", {"extra": ("heads",), "dora": True, "dropout": 0.25}),
], ids=str)  # fmt: skip
def test_memory_is_what_a_step_takes(
    mode: Checkpointing, options: dict[str, Any], toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The peak of forward and backward on a CPU, beyond the weights, against the estimate's parts.

    Where heads train in full, of a second micro-step: the gradients of the first one are there, and do not count.
    """
    config = tiny_config(toy_tokenizer, audio_dual_ffn_layers=list(range(4)), audio_ffn_hidden_size=256,
                         audio_ffn_intermediate_size=640)  # fmt: skip
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "head_dim": 64}
    for name, value in sizes.items():
        setattr(config.text_config, name, value)
    model = make_model(config, 0)
    peft_model = add_lora(model, TrainableOptions(r=8, **options), "single", "base", None)
    for layer in model.layers:
        stack_layer(layer)
    write_checkpoint(tmp_path, toy_tokenizer)
    rng, ids = np.random.default_rng(0), ids_of(tmp_path)
    samples = [random_sample(str(n), rng, toy_tokenizer, ids, frames=(60, 160)) for n in range(14)]
    batch = collate(samples, 0.0, ids)
    weights = LOSS.per_label(torch.cat([batch["label_counts"], batch["pairs"]]).float())

    def step() -> None:
        states = label_states(model, batch, ExecOptions(checkpointing=mode))
        pack_loss(model, states, batch, weights, LOSS, at_labels=True).total.backward()

    if options.get("heads"):
        step()
    states = state_bytes(peft_model)
    text_share = 1 - batch["codes_KA"].shape[1] / batch.positions
    kept = batch.positions * activation_bytes(model, mode, text_share=text_share)
    gradients = 0.0 if options.get("heads") else states.gradients
    expected = gradients + kept + working_bytes(model, batch.positions, mode)
    assert peak_of(step) == pytest.approx(expected, rel=0.15)


def peak_of(step: Callable[[], None]) -> float:
    """Bytes of the tensors that a step has at once, at most, by the profiler's record of each one."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    recorded: Any = profiler.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return float(max(accumulate(sizes)))
