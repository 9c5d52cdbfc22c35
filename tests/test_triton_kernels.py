"""--kernels triton: values and gradients of PyTorch's operations, on a GPU or in Triton's interpreter; refusals.

What needs triton (it comes with torch's CUDA builds) is skipped without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.samples import random_sample
from helpers.step import loss_and_gradients
from helpers.tiny import ids_of, write_checkpoint, write_set
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.data.batch import collate
from higgs_tune.train.model import kernel_choice
from higgs_tune.train.model.attention import plain_rope_and_reorder
from higgs_tune.train.model.dropout import Mask
from higgs_tune.train.model.forward import ExecOptions
from higgs_tune.train.model.fused_linear import fused_project
from higgs_tune.train.model.kernel_choice import choose_kernels
from higgs_tune.train.model.layer_input import Gated, Normed, Rows
from higgs_tune.train.model.linear import Layer
from higgs_tune.train.model.load import load_model
from higgs_tune.train.model.lora import TrainableOptions, add_lora
from torch import nn
from transformers import PreTrainedTokenizerBase

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16]
COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from higgs_tune.train.model import triton_kernels as kernels

row, part = {"WIDTH": 3072, "BLOCK": 4096}, {"WIDTH": 8192, "BLOCK": kernels.ELEMENTS}
heads = {"HEADS": 24, "HALF": 64, "BLOCK_H": 32, "BLOCK_D": 64}
cases = [(kernels.norm_kernel, row), (kernels.norm_backward_kernel, row), (kernels.gated_kernel, part),
         (kernels.gated_backward_kernel, part), (kernels.rope_kernel, {"ANGLES_OF_SOURCE": True, "REORDER": True,
         "SIGN": -1, **heads}), (kernels.dropout_kernel, {"ADD": True, "BLOCK": kernels.ELEMENTS})]
numbers = {"text_rows": "i32", "eps": "fp32", "gate_stride": "i32", "up_stride": "i32", "x_stride": "i32",
           "count": "i32", "seed": "i64", "threshold": "i64", "order": "*i64", "weight": "*fp32"}
for capability in (80, 89, 90):
    for kernel, constants in cases:
        types = {name: "*bf16" for name in kernel.arg_names} | numbers | {name: "constexpr" for name in constants}
        signature = {name: types[name] for name in kernel.arg_names}
        made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"], (kernel, capability)
print("compiled")
"""


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """The module, which needs triton; `conftest.py` asks for its interpreter where there is no GPU."""
    from higgs_tune.train.model import triton_kernels

    return triton_kernels


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def assert_rounded(got: torch.Tensor, exact: torch.Tensor) -> None:
    """`got` is what float64 arithmetic on the same inputs gives, but for float32 sums and one rounding.

    Triton's interpreter cuts the lower bits of a bfloat16 off; GPUs round them.
    """
    share = 1e-5 if got.dtype == torch.float32 else 2**-7
    assert got.shape == exact.shape
    torch.testing.assert_close(got.double(), exact, rtol=share, atol=share * 0.1)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text_rows", [0, 3, 5])
def test_norm(dtype: torch.dtype, text_rows: int, kernels: ModuleType) -> None:
    """Of a width that fills no block, with a weight of its own for audio rows; and of no rows."""
    torch.manual_seed(0)
    x, grad, weights = randn(5, 48, dtype=dtype), randn(5, 48, dtype=dtype), randn(2, 48, dtype=torch.float32)
    source = kernels.TritonNormed(x, weights[0], weights[1], text_rows, 1e-5)
    exact_x = x.double().requires_grad_()
    unit = exact_x * torch.rsqrt(exact_x.square().mean(1, keepdim=True) + 1e-5)
    exact = torch.cat([unit[:text_rows] * weights[0].double(), unit[text_rows:] * weights[1].double()])
    (exact_grad,) = torch.autograd.grad(exact, exact_x, grad.double())
    assert_rounded(source.forward(), exact.detach())
    out, recomputed = source.recompute()
    assert_rounded(out, exact.detach())
    needed = Normed(True, False, False, False, False)  # pyright: ignore[reportArgumentType]
    assert_rounded(source.backward(grad, recomputed, needed)[0], exact_grad)
    assert kernels.TritonNormed(x[:0], weights[0], weights[1], 0, 1e-5).forward().shape == (0, 48)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [24, 1500])
def test_gated(dtype: torch.dtype, width: int, kernels: ModuleType) -> None:
    """Of two halves of one tensor, as stacked layers give them."""
    torch.manual_seed(0)
    gate, up = randn(3, 2 * width, dtype=dtype).split(width, 1)
    grad, source = randn(3, width, dtype=dtype), kernels.TritonGated(gate, up)
    exact_gate, exact_up = gate.double().requires_grad_(), up.double().requires_grad_()
    exact = exact_gate * exact_gate.sigmoid() * exact_up
    wanted = torch.autograd.grad(exact, (exact_gate, exact_up), grad.double())
    out, recomputed = source.recompute()
    assert_rounded(out, exact.detach())
    for got, value in zip(source.backward(grad.clone(), recomputed, Gated(gate, up)), wanted, strict=True):
        assert_rounded(got, value)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reorder", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_rope(dtype: torch.dtype, reorder: bool, heads: int, kernels: ModuleType) -> None:
    """Rows of a wider tensor; the gradient is brought back and rotated back. Without angles, the order alone."""
    torch.manual_seed(0)
    x = randn(6, heads * 24 + 8, dtype=dtype)[:, : heads * 24].unflatten(1, (heads, 24)).requires_grad_()
    order = torch.randperm(6, device=DEVICE) if reorder else None
    back = torch.argsort(order) if order is not None else None
    angles = torch.rand(6, 12, device=DEVICE).repeat(1, 2)
    cos, sin, grad = angles.cos().to(dtype), angles.sin().to(dtype), randn(6, heads, 24, dtype=dtype)
    exact_x = x.detach().double().requires_grad_()
    exact = plain_rope_and_reorder(exact_x, order, back, cos.double(), sin.double())
    got = kernels.triton_rope_and_reorder(x, order, back, cos, sin)
    assert_rounded(got, exact.detach())
    assert_rounded(*(torch.autograd.grad(o, i, grad.to(o.dtype))[0] for o, i in ((got, x), (exact, exact_x))))
    assert torch.equal(kernels.triton_rope_and_reorder(x, order, back), x if order is None else x[order])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(dtype: torch.dtype, kernels: ModuleType) -> None:
    """The same mask for the same seed, of the wanted share, row by row and column by column; nothing else changes."""
    torch.manual_seed(0)
    x, into = randn(83, 301, dtype=dtype), randn(83, 301, dtype=dtype)
    mask = kernels.TritonMask(2**61 + 5, x, 0.25)
    kept = mask.drop(torch.ones_like(x))
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    spread = (0.25 * 0.75) ** 0.5
    for shares, count in ((kept.float().mean(), kept.numel()), (kept.float().mean(0), 83), (kept.float().mean(1), 301)):
        assert (shares - 0.75).abs().max() < 5 * spread / count**0.5
    assert torch.equal(mask.drop(x), x * kept)
    assert_rounded(mask.add_dropped(into.clone(), x), into.double() + (x * kept).double())
    assert not torch.equal(kernels.TritonMask(2**61 + 6, x, 0.25).drop(x), x * kept)
    assert mask.drop(x[:0]).shape == (0, 301)


@needs_triton
@pytest.mark.parametrize("dora", [False, True])
def test_layers_with_dropout(dora: bool, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of eager operations under the same mask."""

    class SameMask(Mask):
        def __init__(self, seed: int, x_NH: torch.Tensor, share: float) -> None:
            self._kept_NH = kernels.TritonMask(seed, x_NH, share).drop(torch.ones_like(x_NH))

    torch.manual_seed(0)
    x = torch.randn(9, 24, device=DEVICE, requires_grad=True)
    tensors = [torch.randn(*shape, device=DEVICE) for shape in ((10, 24), (3, 24), (10, 3), (10,))]
    weight, a, b, magnitude = tensors
    trained = [x, *(value.requires_grad_() for value in (a, b, magnitude)[: 3 if dora else 2])]
    layer = Layer(weight, None, a, b, magnitude if dora else None, 0.5, 0.25)
    found = []
    for elementwise in (kernels.TRITON, kernels.TRITON._replace(mask=SameMask)):
        torch.manual_seed(1)
        (out,) = fused_project(Rows(x), [layer], elementwise=elementwise)
        found.append([out, *torch.autograd.grad(out.square().sum(), trained)])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted)


@needs_triton
@pytest.mark.parametrize("options", [{}, {"dora": True, "norms": True}], ids=str)
def test_a_step(options: dict[str, Any], toy_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Loss and gradients of a tiny model as by eager operations, the FFNs checkpointed."""
    write_checkpoint(tmp_path / "model", toy_tokenizer)
    ids = ids_of(tmp_path / "model")
    sample = random_sample("s", np.random.default_rng(0), toy_tokenizer, ids, frames=(3, 5))
    shards = ShardSet(write_set(tmp_path / "data", [sample], tmp_path / "model"))
    model = load_model(tmp_path / "model", device=DEVICE, dtype=torch.float32).model
    torch.manual_seed(0)
    add_lora(model, TrainableOptions(r=4, **options), "single", "base", None)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.02)
    batch = collate([shards.read(0)], 0.0, shards.special_ids).to(DEVICE)
    expected = loss_and_gradients(model, batch, ExecOptions())
    got = loss_and_gradients(model, batch, ExecOptions("triton", "selective"))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name] - value).abs().max() <= 1e-4 * value.abs().max() + 1e-9, name


@needs_triton
def test_every_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    """To machine code of compute capability 8.0 (A100), 8.9 (RTX 4090) and 9.0 (H100, H200), without a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=600)  # noqa: PLW1510
    assert done.stdout == "compiled\n", done.stderr


@needs_triton
def test_kernels_that_fail_are_not_chosen(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are compared with the eager operations before `auto` takes them; a wrong value or an error is told."""
    kernel_choice._triton_works.cache_clear()
    assert kernel_choice._triton_works(str(DEVICE))
    assert not capsys.readouterr().err
    monkeypatch.setattr(kernels.TritonGated, "forward", lambda source: source.gate_NF)
    kernel_choice._triton_works.cache_clear()
    assert not kernel_choice._triton_works(str(DEVICE))
    assert "warning: --kernels eager, because Triton's kernels fail on" in capsys.readouterr().err
    kernel_choice._triton_works.cache_clear()


@pytest.mark.fast
def test_choice_and_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for installed, works, expected in ((True, True, "triton"), (True, False, "eager"), (None, True, "eager")):
        monkeypatch.setattr(kernel_choice, "find_spec", lambda name, installed=installed: installed)
        monkeypatch.setattr(kernel_choice, "_triton_works", lambda device, works=works: works)
        assert [choose_kernels("auto", device) for device in (cpu, gpu)] == ["eager", expected]
    assert choose_kernels("compiled", cpu) == "compiled"
    with pytest.raises(UserError, match="not installed"):
        choose_kernels("triton", gpu)
    monkeypatch.setattr(kernel_choice, "find_spec", lambda name: True)
    with pytest.raises(UserError, match="needs a GPU"):
        choose_kernels("triton", cpu)
