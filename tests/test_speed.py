"""What makes steps fast changes no number: compiled, checkpointed and stacked layers; no wait for the device."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.kept import kept_share
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train import loop
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.data.batch import Batch, collate
from higgs_tune.train.dist.gc_schedule import scheduled_gc
from higgs_tune.train.loop import train
from higgs_tune.train.model import products
from higgs_tune.train.model.flops import Rows, model_flops
from higgs_tune.train.model.forward import ExecOptions, hidden_states, label_states
from higgs_tune.train.model.fused_linear import stack_layer
from higgs_tune.train.model.load import HiggsAudioModel, load_model
from higgs_tune.train.model.lora import TrainableOptions, add_lora, trainable
from higgs_tune.train.model.loss import LossOptions, pack_loss
from higgs_tune.train.model.memory import activation_bytes, choose_checkpointing, working_bytes
from higgs_tune.train.model.products import product, scaled_product
from higgs_tune.train.monitor.profiling import kind_of, table
from higgs_tune.train.step import train_step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

LOSS = LossOptions()
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or " " in torch.__file__,
    reason="torch.compile needs a C++ compiler, and a path without a space",
)


def with_lora(toy: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> HiggsAudioModel:
    """The toy model with LoRA whose B matrices are not zero."""
    model = load_model(toy / "model", device=torch.device(device), dtype=dtype).model
    torch.manual_seed(0)
    add_lora(model, TrainableOptions(r=4, **options), "single", toy / "model", None)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def batch_of(shards: ShardSet, rows: range) -> Batch:
    return collate([shards.read(row) for row in rows], 0.0, shards.special_ids)


def step(model: HiggsAudioModel, batch: Batch, exec_options: ExecOptions = ExecOptions()) -> dict[str, torch.Tensor]:  # noqa: B008
    """Forward and backward; the loss and every gradient."""
    weights = LOSS.per_label(torch.cat([batch["label_counts"], batch["pairs"]]).float())
    parts = pack_loss(model, label_states(model, batch, exec_options), batch, weights, LOSS, at_labels=True)
    parts.total.backward()
    gradients = {name: p.grad for name, p in trainable(model).items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients | {"loss": parts.total.detach()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], share: float = 1e-4) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] - value).abs().max() <= share * value.abs().max() + 1e-9, name


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_changes_no_number(toy: Path, shards: ShardSet, checkpointing: Any) -> None:
    model, batch = with_lora(toy), batch_of(shards, range(4))
    assert_same(step(model, batch, ExecOptions(checkpointing=checkpointing)), step(model, batch), 1e-6)


@pytest.mark.fast
@pytest.mark.parametrize("dora", [False, True])
def test_plain_kernels_give_the_same_numbers(toy: Path, shards: ShardSet, dora: bool) -> None:
    """Norm weights train too, so that every gradient of the fused layers is compared."""
    model, batch = with_lora(toy, dora=dora), batch_of(shards, range(4))
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("mlp.down_proj.base_layer.weight"):
            parameter.requires_grad_(True)
    assert_same(step(model, batch), step(model, batch, ExecOptions(plain=True)))


@pytest.mark.parametrize("dora", [False, True])
def test_stacked_weights_change_no_number(toy: Path, shards: ShardSet, dora: bool) -> None:
    model, batch = with_lora(toy, dora=dora), batch_of(shards, range(4))
    before, expected = {name: p.clone() for name, p in model.named_parameters()}, step(model, batch)
    for layer in model.layers:
        stack_layer(layer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    attention: Any = model.layers[0].self_attn
    bases = [p for name, p in attention.named_parameters() if ".base_layer." in name and "o_proj" not in name]
    assert len({p.untyped_storage().data_ptr() for p in bases}) == 1
    assert_same(step(model, batch), expected)


@needs_compiler
def test_compiled_layers_agree_and_are_not_compiled_again(
    toy: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches warm up; other row and sample counts then find everything compiled. What is kept is as estimated."""
    model, exec_options = with_lora(toy), ExecOptions("compiled")
    for rows in (range(3), range(2, 7)):
        assert_same(step(model, batch_of(shards, rows), exec_options), step(model, batch_of(shards, rows)), 1e-3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (range(8), range(5, 6), range(1, 12)):
            assert_same(step(model, batch_of(shards, rows), exec_options), step(model, batch_of(shards, rows)), 1e-3)
    assert kept_share(model, batch_of(shards, range(8)), exec_options, monkeypatch) == pytest.approx(1, abs=0.1)


class Operators(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


WAITING = ("nonzero", "_local_scalar_dense", "item", "masked_select", "unique", "is_nonzero", "repeat_interleave")


def test_no_operator_of_the_step_waits_for_the_device(
    toy: Path, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of forward, backward, clipping, skipping of bad steps, optimizer and moving average, as the trainer runs them."""
    seen: list[Operators] = []

    def watched(*args: Any) -> torch.Tensor:
        with Operators() as operators:
            seen.append(operators)
            return train_step(*args)

    monkeypatch.setattr(loop, "train_step", watched)
    paths = {"model_path": toy / "model", "train_data_dir": (shards.location,), "output_dir": tmp_path / "out"}
    options = {"max_steps": 3, "tokens_per_pack": 2048, "dataloader_num_workers": 0, "ema_decay": 0.9, "eval_steps": 0}
    train(TrainConfig.of(training_stage="single", **paths, **options))  # pyright: ignore[reportArgumentType]
    assert len(seen) == 3
    for operators in seen:
        assert {"aten::addmm", "aten::_fused_adamw_"} <= operators.names
        assert not [name for name in operators.names if any(word in name for word in WAITING)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_step_does_not_synchronise(toy: Path, shards: ShardSet) -> None:
    model = with_lora(toy, "cuda", torch.bfloat16)
    batches = [batch_of(shards, rows).pin_memory().to(torch.device("cuda")) for rows in (range(4), range(4, 9))]
    step(model, batches[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            step(model, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"dora": True, "dropout": 0.25, "extra": ("heads",)}], ids=str)
def test_model_flops_are_what_torch_counts(
    options: dict[str, Any], toy: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrix products of the plain operations, by torch's own counter; attention is left out on both sides."""
    model, batch = with_lora(toy, **options), batch_of(shards, range(6))
    audio = batch["codes_KA"].shape[1]
    labels = (len(batch["text_labels"]), batch["audio_labels_KL"].shape[1])
    rows = Rows(batch.positions, batch.positions - audio, audio, 0, *labels)
    weights = LOSS.per_label(torch.cat([batch["label_counts"], batch["pairs"]]).float())
    monkeypatch.setattr(products, "_has_onednn", lambda: False)  # its operator counts as none
    with FlopCounterMode(display=False) as counter:
        states = hidden_states(model, batch, ExecOptions(plain=True))
        pack_loss(model, states, batch, weights, LOSS).total.backward()
    counts = counter.get_flop_counts()["Global"].items()
    counted = [count for op, count in counts if "mm" in str(op) and "bmm" not in str(op)]
    assert model_flops(model, rows) == pytest.approx(sum(counted), rel=0.1)


def test_auto_checkpointing_takes_the_least_that_fits(toy: Path) -> None:
    model = with_lora(toy)
    needs = [1000 * activation_bytes(model, mode) + working_bytes(model, 1000, mode) for mode in ("none", "selective")]
    frees = [needs[0] / 0.8 + 1, needs[0] / 0.8 - 1e3, needs[1] / 0.8 + 1, needs[1] / 0.8 - 1e3]
    assert [choose_checkpointing(model, 1000, free) for free in frees] == ["none", "selective", "selective", "full"]


def test_garbage_is_collected_by_schedule_only() -> None:
    collected: list[str] = []
    listener: Callable[[str, dict[str, int]], None] = lambda phase, _info: collected.append(phase)  # noqa: E731
    with scheduled_gc() as collect:
        assert not gc.isenabled()
        gc.callbacks.append(listener)
        for number in range(1, 50):
            collect(number)
        assert not collected
        collect(50)
        gc.callbacks.remove(listener)
        assert collected == ["start", "stop"]
    assert gc.isenabled()


def test_profile_says_where_steps_go(shards: ShardSet, toy: Path, tmp_path: Path) -> None:
    paths = {"model_path": toy / "model", "train_data_dir": (shards.location,), "output_dir": tmp_path / "out"}
    options = {"max_steps": 7, "tokens_per_pack": 2048, "dataloader_num_workers": 0, "profile": True, "eval_steps": 0}
    train(TrainConfig.of(training_stage="single", **paths, **options))  # pyright: ignore[reportArgumentType]
    assert (tmp_path / "out" / "profile" / "trace.json").stat().st_size > 1000
    lines = (tmp_path / "out" / "profile" / "table.txt").read_text().splitlines()
    assert any(line.startswith("matrix products") for line in lines)


@pytest.mark.fast
def test_table_of_kinds_adds_up() -> None:
    names = ("aten::mm", "aten::_flash_attention_forward", "ncclDevKernel", "aten::mul")
    assert [kind_of(name) for name in names] == ["matrix products", "attention", "communication", "pointwise and other"]
    assert table([(name, 1.0) for name in names]).splitlines()[-1].split() == ["all", "4.00"]


@pytest.mark.parametrize(("rows", "width", "out"), [(0, 8, 4), (1, 8, 4), (37, 64, 48), (5, 3, 0)])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("onednn", [False, True])
def test_product_is_a_matrix_product(
    rows: int, width: int, out: int, overwrite: bool, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows as they are and of views across wider ones, with and without an addend, with and without oneDNN."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512" if onednn else "AVX2")
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 2 * width)[:, width:], torch.randn(width, out).t()
    plus = torch.randn(rows, out)
    expected = x.double() @ weight.double().t()
    with torch.no_grad():
        torch.testing.assert_close(product(x, weight), expected.float())
        added = product(x, weight, plus.clone(), overwrite=overwrite)
        torch.testing.assert_close(added, (expected + plus).float())
        wide = torch.full((rows, out + 3), torch.nan)  # what is there before counts for nothing
        for values in (
            scaled_product(x, weight, 0.5),
            scaled_product(x.contiguous(), weight, 0.5, wide[:, 2 : 2 + out]),
        ):
            torch.testing.assert_close(values, 0.5 * expected.float())
        assert wide[:, :2].isnan().all() and wide[:, 2 + out :].isnan().all()
