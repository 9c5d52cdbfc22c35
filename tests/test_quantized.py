"""--quantize_base and --optim adamw8bit: the loss of bitsandbytes' dequantized weights; resuming; export; refusals.

What needs bitsandbytes (an optional extra) is skipped without it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.kept import kept_share
from helpers.samples import random_sample
from helpers.step import loss_and_gradients
from helpers.tiny import ids_of, run_train, write_checkpoint, write_set
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.arguments import parse_arguments
from higgs_tune.train.data.batch import collate
from higgs_tune.train.estimate import plan_model
from higgs_tune.train.export.merge import main as export
from higgs_tune.train.model import quantized
from higgs_tune.train.model.forward import Checkpointing, ExecOptions
from higgs_tune.train.model.fused_linear import stack_layer
from higgs_tune.train.model.load import HiggsAudioModel, load_model
from higgs_tune.train.model.lora import TrainableOptions, add_lora
from higgs_tune.train.model.memory import StateBytes, state_bytes
from higgs_tune.train.model.quantized import QUANTIZED, Quantization, QuantizedWeight, quantize_layers
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase

needs_bitsandbytes = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="no bitsandbytes")
KINDS: tuple[Quantization, ...] = ("nf4", "int8")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(toy_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint (`model`) and a set of 8 samples (`data`)."""
    made = tmp_path_factory.mktemp("quantized")
    write_checkpoint(made / "model", toy_tokenizer)
    rng, ids = np.random.default_rng(0), ids_of(made / "model")
    samples = [random_sample(f"s{number}", rng, toy_tokenizer, ids) for number in range(8)]
    write_set(made / "data", samples, made / "model")
    return made


def adapted(model: HiggsAudioModel, **options: Any) -> HiggsAudioModel:
    torch.manual_seed(0)
    add_lora(model, TrainableOptions(r=4, **options), "single", "base", None)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.05)
    for layer in model.layers:
        stack_layer(layer)
    return model


def dequantized_by_bitsandbytes(weight: torch.Tensor, kind: Quantization) -> torch.Tensor:
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    if kind == "int8":
        codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
        return codes * scale[:, None] / 127
    return functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))


@needs_bitsandbytes
@pytest.mark.parametrize("options", [{}, {"dora": True, "dropout": 0.25}, {"norms": True, "heads": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_dequantized_weights(
    kind: Quantization, options: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And backward keeps what is estimated: no weight that was made whole."""
    shards = ShardSet(folder / "data")
    batch = collate([shards.read(row) for row in range(8)], 0.0, shards.special_ids)
    plain = load_model(folder / "model", device=CPU, dtype=torch.float32).model
    original = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    for name, parameter in plain.named_parameters():
        if QUANTIZED.fullmatch(name):
            parameter.data = dequantized_by_bitsandbytes(parameter.data, kind)
    model = load_model(folder / "model", device=CPU, dtype=torch.float32, quantization=kind).model
    held = {name for name, parameter in model.named_parameters() if isinstance(parameter, QuantizedWeight)}
    assert len(held) == 2 * (4 + 3 + 3)  # attention and both FFNs of two layers
    for name, parameter in model.named_parameters():
        if name not in held:
            assert torch.equal(parameter, original[name])  # heads, embeddings and norms
    wanted = loss_and_gradients(adapted(plain, **options), batch, ExecOptions())
    adapted(model, **options)
    modes: tuple[Checkpointing, ...] = ("none", "selective", "full")
    for exec_options in (ExecOptions(plain=True), *(ExecOptions(checkpointing=mode) for mode in modes)):
        got = loss_and_gradients(model, batch, exec_options)
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert (got[name] - value).abs().max() <= 1e-4 * value.abs().max() + 1e-9, name
        if not exec_options.plain:
            assert kept_share(model, batch, exec_options, monkeypatch) == pytest.approx(1, abs=0.1)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors") | load_file(folder / "optimizer.safetensors")


@needs_bitsandbytes
@pytest.mark.parametrize("options", [
    {"quantize_base": "nf4"}, {"optim": "adamw8bit"}, {"quantize_base": "int8", "optim": "adamw8bit"},
], ids=str)  # fmt: skip
def test_a_resumed_run_is_bit_equal(options: dict[str, str], folder: Path, tmp_path: Path, capsys: Any) -> None:
    common: dict[str, Any] = {
        "tokens_per_pack": 512,
        "max_steps": 4,
        "save_steps": 2,
        "lora_r": 64,
        "save_total_limit": 9,
    }
    common |= {"skip_alignment_check": True, "learning_rate": 1e-2, "lora_dropout": 0.1}
    lines = run_train("single", folder / "model", folder / "data", tmp_path / "whole", **common, **options)
    if kind := options.get("quantize_base"):
        assert f"base in {kind}" in capsys.readouterr().out
    assert lines[-1]["loss"] < lines[0]["loss"]
    half = tmp_path / "whole" / "checkpoint-2"
    run_train("single", folder / "model", folder / "data", tmp_path / "resumed", **common, **options,
              resume_from_checkpoint=half)  # fmt: skip
    whole, resumed = (state_of(tmp_path / name / "checkpoint-4") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    if "optim" in options:
        eight_bit = [value for name, value in whole.items() if name.startswith(("state1.", "state2."))]
        assert any(value.dtype == torch.uint8 for value in eight_bit)
    with pytest.raises(SystemExit) as error:
        run_train(
            "single", folder / "model", folder / "data", tmp_path / "other", **common, resume_from_checkpoint=half
        )
    assert error.value.code == 2
    said = capsys.readouterr().err
    for name, shown in (("quantize_base", "quantized_base: "), ("optim", "optimizer: ")):
        assert (shown in said) == (name in options)


@needs_bitsandbytes
def test_export_merges_into_the_original_base(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_train("single", folder / "model", folder / "data", tmp_path / "out", quantize_base="nf4", save_steps=0,
              max_steps=2, skip_alignment_check=True, learning_rate=1e-2)  # fmt: skip
    monkeypatch.setattr("sys.argv", ["export", str(tmp_path / "out"), "--out", str(tmp_path / "merged")])
    export()
    base, merged = (load_file(tmp / "model.safetensors") for tmp in (folder / "model", tmp_path / "merged"))
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, value in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in adapter:
            value = value + 2.0 * adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]  # noqa: PLW2901
        torch.testing.assert_close(merged[name], value.to(merged[name].dtype), atol=1e-6, rtol=1e-2)  # bfloat16


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_planned_sizes_are_those_of_bitsandbytes(kind: Quantization, folder: Path) -> None:
    model = load_model(folder / "model", device=CPU, dtype=torch.float32, quantization=kind).model
    config = parse_arguments(["--estimate", "--gpu", "3060", "--model_path", str(folder / "model")])
    planned = plan_model(config, [])[0].model
    bare = {name.replace("base_layer.", "") for name, p in planned.named_parameters() if ".lora_" not in name}
    assert bare == {name for name, _ in model.named_parameters()}
    sizes = nn.Module.to(load_model(folder / "model", device=CPU, dtype=torch.float32).model, "meta")
    quantize_layers(sizes, kind)
    assert state_bytes(sizes) == state_bytes(model)


@pytest.mark.fast
def test_the_released_base_in_4_bits_fits_12_gb(capfd: Any) -> None:
    """2.54 GB for 4.93 B weights at 4.13 bits, 1.68 GB for all others in bfloat16; needs no bitsandbytes."""

    def states(*flags: str) -> StateBytes:
        return plan_model(parse_arguments(["--estimate", "--gpu", "3060", *flags]), [])[0].states

    linear = 28 * (3072 * (3072 + 2 * 1024 + 3072) + 6 * 3072 * 8192)
    others = 128_256 * 3072 * 2 + 8 * 1026 * 3072 * 2 + (4 * 28 + 1) * 3072
    four_bits = linear / 2 + linear / 64 * (1 + 4 / 256) + 28 * 10 * 4 * (16 + 1 + 256)
    assert states("--quantize_base", "nf4").frozen == pytest.approx(four_bits + 2 * others, rel=1e-4)
    assert states("--quantize_base", "int8").frozen == pytest.approx(linear + 2 * others, rel=1e-3)
    assert states("--quantize_base", "nf4", "--optim", "adamw8bit").moments < states().moments / 3.8
    assert states().frozen == 2 * (linear + others)


@pytest.mark.fast
def test_refusals_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    required = ["--training_stage", "single", "--model_path", "M", "--train_data_dir", "S", "--output_dir", "O"]
    for flag in ("--full_finetune", "--kernels compiled"):
        with pytest.raises(UserError, match=f"--quantize_base and {flag} exclude each other"):
            parse_arguments([*required, "--quantize_base", "nf4", *flag.split()])
    with pytest.raises(UserError, match="Here it is --quantize_base nf4"):
        parse_arguments([*required, "--load_in_4bit"])
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    for option in ({"quantize_base": "int8"}, {"optim": "adamw8bit"}):
        with pytest.raises(SystemExit) as error:
            run_train("single", folder / "model", folder / "data", tmp_path / "out", **option)
        assert error.value.code == 2
        said = capsys.readouterr().err
        assert "needs bitsandbytes, which is not installed" in said and "higgs-tune[quantize]" in said
        assert not (tmp_path / "out").exists()
