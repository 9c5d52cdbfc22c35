"""Every kind of LoRA runs fused: PEFT's numbers under the same dropout masks, memory as estimated, paths as printed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.kept import kept_share
from helpers.samples import random_sample
from helpers.step import loss_and_gradients
from helpers.tiny import ids_of, tiny_config
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.data.batch import Batch, collate
from higgs_tune.train.model import forward, fused_linear, linear
from higgs_tune.train.model.attention import _BlockedAttention  # pyright: ignore[reportPrivateUsage]
from higgs_tune.train.model.dropout import drop
from higgs_tune.train.model.forward import Checkpointing, ExecOptions
from higgs_tune.train.model.fused_linear import fused_project, stack_frozen_weights, stack_layer
from higgs_tune.train.model.layer_input import Gated, Normed, Rows, Source
from higgs_tune.train.model.linear import layer_of, layers_of, plain_project
from higgs_tune.train.model.load import HiggsAudioModel, load_model
from higgs_tune.train.model.lora import TrainableOptions, add_lora
from higgs_tune.train.model.paths import BY_BOSON, BY_PEFT, describe_kernels, describe_paths
from higgs_tune.train.presets import PRESETS
from higgs_tune.train.toy import make_model, tower_changes
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase

SEED = 1234567
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.25},
    "DoRA": {"dora": True},
    "DoRA, dropout": {"dora": True, "dropout": 0.25},
    "rsLoRA, dropout": {"rslora": True, "dropout": 0.25},
}
PLACES: dict[str, dict[str, Any]] = {
    "every preset layer": {},
    "heads and norms": {"extra": ("heads",), "norms": True},
    "much in full": {"heads": True, "norms": True, "text_embeddings": True, "audio_embeddings": True},
    "audio attention": {"audio_attention": True},
    "attention alone": {"preset": "attention_only"},
    "text alone": {"preset": "text_only"},
    "queries of one layer": {"pattern": r"layers\.1\.self_attn\.q_proj"},
}
COMBINATIONS = [{**kind, **place} for kind, place in itertools.product(KINDS.values(), PLACES.values())]
MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")


class SameDropout(nn.Dropout):
    """PEFT's dropout with the mask of a seed."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return drop(input, self.p, SEED) / (1 - self.p) if self.training else input


def peft_layers(adapters: int, *, bias: bool, base_trains: bool, **options: Any) -> nn.ModuleDict:
    """Two linear layers of 24 inputs, adapted by PEFT, their A, B and magnitudes away from where they begin."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({"one": nn.Linear(24, 10, bias=bias), "two": nn.Linear(24, 14, bias=bias)})
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["one", "two"], **options)
    peft_model = get_peft_model(layers, config)  # pyright: ignore[reportArgumentType]
    for number in range(1, adapters):
        peft_model.add_adapter(f"adapter{number}", LoraConfig(r=2, lora_alpha=3, target_modules=["one"], **options))
    peft_model.base_model.set_adapter(["default", *(f"adapter{number}" for number in range(1, adapters))])  # pyright: ignore
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
        if "magnitude" in name:
            parameter.data *= torch.rand_like(parameter) + 0.5
        parameter.requires_grad_("lora" in name or base_trains)
    for module in peft_model.modules():
        if isinstance(module, nn.ModuleDict):
            for name, child in module.items():
                if isinstance(child, nn.Dropout):
                    module[name] = SameDropout(child.p)
    return layers.train()


def sources() -> list[Source]:
    torch.manual_seed(1)
    x, weights, order = torch.randn(17, 24, requires_grad=True), torch.rand(2, 24) + 0.5, torch.randperm(17)
    gate_up = torch.randn(2, 17, 24).requires_grad_().unbind()
    normed, gated = Normed(x, weights[0], weights[1], 11, 1e-5), Gated(gate_up[0], gate_up[1])
    return [Rows(x), Rows(x, order, torch.argsort(order)), normed, gated]


def gradients(outputs: list[torch.Tensor], source: Source, layers: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(2)
    total = torch.stack([(out * torch.randn_like(out)).sum() for out in outputs]).sum()
    wanted = [value for value in source if isinstance(value, torch.Tensor) and value.requires_grad]
    wanted += [parameter for parameter in layers.parameters() if parameter.requires_grad]
    return [*outputs, *torch.autograd.grad(total, wanted)]


@pytest.mark.fast
@pytest.mark.parametrize("base_trains", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("adapters", "dora", "dropout", "rslora"), [
    (1, False, 0.0, False), (1, False, 0.3, True), (1, True, 0.0, True), (1, True, 0.3, False), (2, False, 0.3, False),
])  # fmt: skip
def test_values_and_gradients_are_pefts(
    adapters: int, dora: bool, dropout: float, rslora: bool, bias: bool, base_trains: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of every kind of input, two layers together (their weights stacked) and one with a residual."""
    options = {"use_dora": dora, "lora_dropout": dropout, "use_rslora": rslora}
    layers = peft_layers(adapters, bias=bias, base_trains=base_trains, **options)
    monkeypatch.setattr(linear, "new_seed", lambda: SEED)
    monkeypatch.setattr(fused_linear, "new_seed", lambda: SEED)
    for names in (("one", "two"), ("one",)):
        modules = [layers[name] for name in names]
        stack_frozen_weights(modules)
        for source in sources():
            residual = torch.randn(17, 10) if len(names) == 1 else None
            expected = [module(source.forward()) for module in modules]
            expected = expected if residual is None else [residual + expected[0]]
            group = nn.ModuleList(modules)
            for project in (fused_project, plain_project):
                got = gradients(project(source, layers_of(*modules), residual), source, group)
                for value, wanted in zip(got, gradients(expected, source, group), strict=True):
                    torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)
                expected = [module(source.forward()) for module in modules]
                expected = expected if residual is None else [residual + expected[0]]


def model_with(toy: Path, dtype: torch.dtype = torch.float32, **options: Any) -> HiggsAudioModel:
    """The toy model with LoRA in training; what begins at zero (B, and new attention's output) does not."""
    attention = options.get("audio_attention", False)
    model = load_model(toy / "model", device=torch.device("cpu"), dtype=dtype, audio_attention=attention).model
    return adapted(model, toy / "model", **options)


def adapted(model: HiggsAudioModel, base: Path, **options: Any) -> HiggsAudioModel:
    torch.manual_seed(0)
    add_lora(model, TrainableOptions(r=4, **options), "single", base, None)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or "audio_attn.o_proj" in name:
            nn.init.normal_(parameter, std=0.02)
    for layer in model.layers:
        stack_layer(layer)
    return model


def assert_keeps_what_is_estimated(
    model: HiggsAudioModel, batch: Batch, mode: Checkpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = kept_share(model, batch, ExecOptions(checkpointing=mode), monkeypatch)
    assert share == pytest.approx(1, abs=0.05), mode


def batch_of(shards: ShardSet, rows: range) -> Batch:
    return collate([shards.read(row) for row in rows], 0.0, shards.special_ids)


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_every_combination_runs_fused_as_printed_and_keeps_what_is_estimated(
    options: dict[str, Any], toy: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of the plain layers, checkpointed or not; no group of layers leaves the fused path."""
    model, batch = model_with(toy, **options), batch_of(shards, range(2))
    expected = loss_and_gradients(model, batch, ExecOptions(plain=True))
    lines = describe_paths(model, ExecOptions())
    assert all(" fused " in line for line in lines)
    kind = ("DoRA" if options.get("dora") else "LoRA") + " r 4" + (" dropout 0.25" if options.get("dropout") else "")
    assert any(kind in line for line in lines)
    monkeypatch.setattr(fused_linear, "plain_project", None)
    for mode in MODES:
        got = loss_and_gradients(model, batch, ExecOptions(checkpointing=mode))
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert (got[name] - value).abs().max() <= 1e-5 * value.abs().max() + 1e-9, (mode, name)
        assert_keeps_what_is_estimated(model, batch, mode, monkeypatch)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_several_adapters_run_fused_and_keep_what_is_estimated(
    dropout: float, toy: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two active at once, as PEFT has them, of different rank and layers."""
    model, batch = (
        load_model(toy / "model", device=torch.device("cpu"), dtype=torch.float32).model,
        batch_of(shards, range(2)),
    )
    torch.manual_seed(0)
    every = LoraConfig(r=4, lora_dropout=dropout, target_modules=PRESETS["comprehensive"].pattern)
    peft_model = get_peft_model(model, every)  # pyright: ignore[reportArgumentType]
    assert isinstance(peft_model, PeftModel)
    peft_model.add_adapter("other", LoraConfig(r=2, lora_dropout=dropout, target_modules=["q_proj", "down_proj"]))
    peft_model.base_model.set_adapter(["default", "other"])  # pyright: ignore[reportCallIssue]
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.02)
    peft_model.train()
    assert all(" fused " in line for line in describe_paths(model, ExecOptions()))
    expected = loss_and_gradients(model, batch, ExecOptions(plain=True))
    for mode in MODES:
        got = loss_and_gradients(model, batch, ExecOptions(checkpointing=mode))
        for name, value in expected.items():
            assert (got[name] - value).abs().max() <= 1e-5 * value.abs().max() + 1e-9, (mode, name)
        assert_keeps_what_is_estimated(model, batch, mode, monkeypatch)


@pytest.mark.parametrize("place", ["every preset layer", "heads and norms", "much in full"])
@pytest.mark.parametrize("kind", ["plain", "DoRA, dropout"])
def test_bfloat16_keeps_what_is_estimated(
    kind: str, place: str, toy: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocked attention, which like a GPU's flash kernel keeps queries, keys, values and output alone.

    On a CPU, attention in bfloat16 is torch's own, which keeps more.
    """
    model = model_with(toy, torch.bfloat16, **KINDS[kind], **PLACES[place])
    monkeypatch.setattr(forward, "causal_attention", blocked_attention)
    for mode in MODES:
        assert_keeps_what_is_estimated(model, batch_of(shards, range(2)), mode, monkeypatch)


def blocked_attention(q_NhD: torch.Tensor, k_NhD: torch.Tensor, v_NhD: torch.Tensor, *lengths: Any) -> torch.Tensor:
    """`causal_attention`'s kernel for float32 on a CPU, which takes any dtype."""
    out_NhD = _BlockedAttention.apply(q_NhD, k_NhD, v_NhD, [length for length in lengths[0] if length])
    assert isinstance(out_NhD, torch.Tensor)
    return out_NhD


@pytest.mark.parametrize("kind", ["dual_ffn", "dual_ffn_fast_forward"])
def test_layers_without_an_audio_ffn_keep_what_is_estimated(
    kind: str, toy_tokenizer: PreTrainedTokenizerBase, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two layers: audio takes the text FFN there, or passes by; audio attention in the other."""
    changes = {"audio_adapter_type": kind, "audio_dual_ffn_layers": [1], "use_audio_out_self_attention": True}
    model = adapted(make_model(tiny_config(toy_tokenizer, **changes), 0), toy)
    rng, ids = np.random.default_rng(0), ids_of(toy / "model")
    samples = [random_sample(str(number), rng, toy_tokenizer, ids, frames=(20, 60)) for number in range(4)]
    for mode in MODES:
        assert_keeps_what_is_estimated(model, collate(samples, 0.0, ids), mode, monkeypatch)


@pytest.mark.fast
def test_what_is_not_fused_is_printed(toy: Path, shards: ShardSet) -> None:
    """Two adapters of which one is DoRA: PEFT's own forward, and a line that says so."""
    model = load_model(toy / "model", device=torch.device("cpu"), dtype=torch.float32).model
    name = "layers.0.self_attn.o_proj"
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=[name], use_dora=True))  # pyright: ignore
    assert isinstance(peft_model, PeftModel)
    peft_model.add_adapter("other", LoraConfig(r=2, target_modules=[name]))
    peft_model.base_model.set_adapter(["default", "other"])  # pyright: ignore[reportCallIssue]
    assert layer_of(model.get_submodule(name)) is None
    (line,) = [line for line in describe_paths(model, ExecOptions()) if BY_PEFT in line]
    assert line.split()[:2] == ["self_attn", "o_proj"]
    assert all("boson's forward" in line for line in describe_paths(model, ExecOptions(), reference=True))
    compiled = describe_paths(model, ExecOptions("compiled"))
    assert any("q_proj" in line and " compiled " in line for line in compiled)


@pytest.mark.fast
def test_the_kernels_beside_are_printed(toy: Path) -> None:
    """Triton's by name where they run, and where their backward is eager; attention's."""
    model, triton = model_with(toy, norms=True), ExecOptions("triton")
    found = {line.split("  ")[1]: " triton " in line for line in describe_paths(model, triton)}
    assert {kind for kind, by_triton in found.items() if by_triton} == {
        "self_attn q_proj, k_proj, v_proj", "mlp gate_proj, up_proj", "mlp down_proj",
        "audio_mlp gate_proj, up_proj", "audio_mlp down_proj",
    }  # fmt: skip
    attention, norms = describe_kernels(model, triton)
    assert attention == "  attention: blocked" and norms.endswith("eager backward")
    assert describe_kernels(model, ExecOptions()) == describe_kernels(model_with(toy), triton) == [attention]
    assert describe_kernels(model_with(toy, torch.bfloat16), triton) == ["  attention: torch's own, a sample at a time"]


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_with_lora_is_printed(kind: str, toy_tokenizer: PreTrainedTokenizerBase, toy: Path) -> None:
    """Its layers run by PEFT's forward, those without LoRA by boson's; all others stay fused."""
    model = make_model(tiny_config(toy_tokenizer, **tower_changes()), 0)
    adapted(model, toy, features="mel", pattern=r"audio_tower\.layers\.\d+\.(self_attn\.[qv]_proj|fc1)", **KINDS[kind])
    lines = describe_paths(model, ExecOptions())
    tower = {line.split()[1]: line for line in lines if "audio_tower" in line}
    assert {name for name, line in tower.items() if BY_PEFT in line} == {"q_proj", "v_proj", "fc1"}
    assert {name for name, line in tower.items() if BY_BOSON in line} == {"k_proj", "out_proj", "fc2"}
    assert all(" fused " in line for line in lines if "audio_tower" not in line)


@pytest.mark.parametrize("kind", ["dropout", "DoRA", "DoRA, dropout"])
def test_dropout_and_dora_are_not_compiled(
    kind: str, toy: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code would keep masks (a third more than estimated), so they run fused, as the run prints."""
    model, batch = model_with(toy, **KINDS[kind]), batch_of(shards, range(2))
    expected, compiled = loss_and_gradients(model, batch, ExecOptions()), ExecOptions("compiled")
    assert describe_paths(model, compiled) == describe_paths(model, ExecOptions())
    got = loss_and_gradients(model, batch, compiled)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert kept_share(model, batch, compiled, monkeypatch) == pytest.approx(1, abs=0.1)
    partly = describe_paths(model_with(toy, pattern=r".*\.down_proj", **KINDS[kind]), compiled)
    found = {line.split("  ")[1]: " compiled " in line for line in partly if "mlp" in line or "q_proj" in line}
    assert found["mlp gate_proj, up_proj"] is False and found["self_attn q_proj, k_proj, v_proj"] is True
