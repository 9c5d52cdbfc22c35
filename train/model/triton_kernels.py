"""Norms, SiLU(gate) * up, rotary embedding and dropout as one Triton kernel each, forward and backward.

In: the tensors of the eager operations. Out: the same values, whose intermediate ones stay in float32. `TRITON` and
`triton_rope_and_reorder` stand in for `fused_linear.EAGER` and `attention.rope_and_reorder`. Guarantees
(test_triton_kernels.py): values and gradients of the eager operations, but for the mask of dropout, which the kernels
draw by themselves (Philox, https://doi.org/10.1145/2063384.2063405); each kernel compiles for the GPUs in use.

A program takes a row, so a norm reads its row once. Triton comes with torch's CUDA builds; with TRITON_INTERPRET=1 the
kernels run on a CPU, for tests.

Shapes: N rows, H hidden, F FFN width, D head size, h heads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from higgs_tune.train.model.attention import rope_and_reorder
from higgs_tune.train.model.dropout import Mask
from higgs_tune.train.model.fused_linear import Elementwise
from higgs_tune.train.model.layer_input import Gated, Grads, Normed, Recomputed

ELEMENTS = 1024  # that a program of SiLU takes at a time, and each of a dropout program's four parts
VARYING = ["text_rows", "seed", "count", "threshold"]  # no kernel is compiled anew for a number divisible by 16


@triton.jit
def _row(x, weight, audio_weight, text_rows, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A row in float32, its weight, and the factor that gives it a mean square of 1."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < WIDTH
    value = tl.load(x + row * WIDTH + at, inside, 0.0).to(tl.float32)
    if row < text_rows:
        scale = tl.load(weight + at, inside, 0.0).to(tl.float32)
    else:
        scale = tl.load(audio_weight + at, inside, 0.0).to(tl.float32)
    return value, scale, tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps), row * WIDTH + at, inside


@triton.jit(do_not_specialize=VARYING)
def norm_kernel(x, weight, audio_weight, out, text_rows, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    value, scale, factor, at, inside = _row(x, weight, audio_weight, text_rows, eps, WIDTH, BLOCK)
    tl.store(out + at, value * factor * scale, inside)


@triton.jit(do_not_specialize=VARYING)
def norm_backward_kernel(x, weight, audio_weight, grad, out, text_rows, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    value, scale, factor, at, inside = _row(x, weight, audio_weight, text_rows, eps, WIDTH, BLOCK)
    inner, unit = tl.load(grad + at, inside, 0.0).to(tl.float32) * scale, value * factor
    tl.store(out + at, (inner - unit * (tl.sum(inner * unit, 0) / WIDTH)) * factor, inside)


@triton.jit
def _gate_up(gate, up, gate_stride, up_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A part of a row of both in float32, the sigmoid of the gate, and where the part stands in a whole tensor."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    gate_value = tl.load(gate + row * gate_stride + at, inside, 0.0).to(tl.float32)
    up_value = tl.load(up + row * up_stride + at, inside, 0.0).to(tl.float32)
    return gate_value, up_value, tl.sigmoid(gate_value), row * WIDTH + at, inside


@triton.jit
def gated_kernel(gate, up, out, gate_stride, up_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    value, times, sigmoid, at, inside = _gate_up(gate, up, gate_stride, up_stride, WIDTH, BLOCK)
    tl.store(out + at, value * sigmoid * times, inside)


@triton.jit
def gated_backward_kernel(
    gate, up, grad, grad_gate, grad_up, gate_stride, up_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    value, times, sigmoid, at, inside = _gate_up(gate, up, gate_stride, up_stride, WIDTH, BLOCK)
    grad_value = tl.load(grad + at, inside, 0.0).to(tl.float32)
    tl.store(grad_up + at, grad_value * value * sigmoid, inside)
    tl.store(grad_gate + at, grad_value * times * sigmoid * (1 + value * (1 - sigmoid)), inside)


@triton.jit
def rope_kernel(
    x, order, cos, sin, out, x_stride, ANGLES_OF_SOURCE: tl.constexpr, REORDER: tl.constexpr, SIGN: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row `order[i]` of x, rotated by its own angles (or by those of row i), becomes row i."""
    row = tl.program_id(0).to(tl.int64)
    source = row
    if REORDER:
        source = tl.load(order + row).to(tl.int64)
    angles = source if ANGLES_OF_SOURCE else row
    head, at = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None]
    inside = (head < HEADS) & (at < HALF)
    place = head * 2 * HALF + at
    first = tl.load(x + source * x_stride + place, inside, 0.0).to(tl.float32)
    second = tl.load(x + source * x_stride + place + HALF, inside, 0.0).to(tl.float32)
    cosine = tl.load(cos + angles * 2 * HALF + at, at < HALF, 0.0).to(tl.float32)
    sine = tl.load(sin + angles * 2 * HALF + at, at < HALF, 0.0).to(tl.float32) * SIGN
    out += row * HEADS * 2 * HALF + place
    tl.store(out, first * cosine - second * sine, inside)
    tl.store(out + HALF, second * cosine + first * sine, inside)


@triton.jit(do_not_specialize=VARYING)
def dropout_kernel(x, into, out, seed, count, threshold, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """out = x under the mask of a seed; with ADD, `into` plus that."""
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    words = tl.randint4x(seed, program * BLOCK + at)
    at = program.to(tl.int64) * 4 * BLOCK + at
    for part in tl.static_range(4):
        here = at + part * BLOCK
        inside = here < count
        stays = words[part].to(tl.uint32, bitcast=True) >= threshold
        value = tl.where(stays, tl.load(x + here, inside, 0.0), 0.0)
        if ADD:
            value = tl.load(into + here, inside, 0.0).to(tl.float32) + value.to(tl.float32)
        tl.store(out + here, value, inside)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **sizes: Any) -> None:
    kernel[grid](*arguments, **sizes)


def _width(size: int) -> dict[str, int]:
    """Sizes of a program that takes a whole row."""
    block = triton.next_power_of_2(size)
    return {"WIDTH": size, "BLOCK": block, "num_warps": min(16, max(1, block // 512))}


class TritonNormed(Normed):
    """`Normed`, by one kernel forward and one backward."""

    def forward(self) -> torch.Tensor:
        x_NH = self.x_NH.contiguous()
        out_NH = torch.empty_like(x_NH)
        if len(x_NH):
            weights = self.weight_H, self.audio_weight_H
            _launch(
                norm_kernel, (len(x_NH),), x_NH, *weights, out_NH, self.text_rows, self.eps, **_width(x_NH.shape[1])
            )
        return out_NH

    def recompute(self) -> tuple[torch.Tensor, Recomputed]:
        return self.forward(), ()

    def backward(self, grad_NH: torch.Tensor, recomputed: Recomputed, needed: Normed) -> Grads:
        del recomputed
        if needed.weight_H or needed.audio_weight_H:  # a sum over rows, which these kernels do not make
            return super().backward(grad_NH, self._unit(), needed)
        x_NH, grad_NH = self.x_NH.contiguous(), grad_NH.contiguous()
        out_NH = torch.empty_like(grad_NH)
        if len(x_NH):
            rows = x_NH, self.weight_H, self.audio_weight_H, grad_NH, out_NH
            _launch(norm_backward_kernel, (len(x_NH),), *rows, self.text_rows, self.eps, **_width(x_NH.shape[1]))
        return [out_NH, None, None, None, None]


class TritonGated(Gated):
    """`Gated`, by one kernel forward and one backward."""

    def forward(self) -> torch.Tensor:
        out_NF = torch.empty(self.gate_NF.shape, dtype=self.gate_NF.dtype, device=self.gate_NF.device)
        self._run(gated_kernel, out_NF)
        return out_NF

    def recompute(self) -> tuple[torch.Tensor, Recomputed]:
        return self.forward(), ()

    def backward(self, grad_NF: torch.Tensor, recomputed: Recomputed, needed: Gated) -> Grads:
        del recomputed, needed
        grad_NF = grad_NF.contiguous()
        grads = [torch.empty_like(grad_NF), torch.empty_like(grad_NF)]
        self._run(gated_backward_kernel, grad_NF, *grads)
        return list(grads)

    def _run(self, kernel: Any, *others: torch.Tensor) -> None:
        (rows, width), strides = self.gate_NF.shape, (self.gate_NF.stride(0), self.up_NF.stride(0))
        assert self.gate_NF.stride(1) == self.up_NF.stride(1) == 1
        if rows:
            grid = rows, triton.cdiv(width, ELEMENTS)
            _launch(kernel, grid, self.gate_NF, self.up_NF, *others, *strides, WIDTH=width, BLOCK=ELEMENTS)


class TritonMask(Mask):
    """A mask that is drawn where it is used, and never written."""

    def __init__(self, seed: int, x_NH: torch.Tensor, share: float) -> None:
        del x_NH
        self.seed, self.threshold = seed, round(share * 2**32)

    def drop(self, x_NH: torch.Tensor) -> torch.Tensor:
        x_NH = x_NH.contiguous()
        return self._run(x_NH, x_NH, torch.empty_like(x_NH), add=False)

    def add_dropped(self, into_NH: torch.Tensor, x_NH: torch.Tensor) -> torch.Tensor:
        assert into_NH.is_contiguous()
        return self._run(x_NH.contiguous(), into_NH, into_NH, add=True)

    def _run(self, x_NH: torch.Tensor, into_NH: torch.Tensor, out_NH: torch.Tensor, *, add: bool) -> torch.Tensor:
        if count := x_NH.numel():
            grid = (triton.cdiv(count, 4 * ELEMENTS),)
            tensors, numbers = (x_NH, into_NH, out_NH), (self.seed, count, self.threshold)
            _launch(dropout_kernel, grid, *tensors, *numbers, ADD=add, BLOCK=ELEMENTS)
        return out_NH


TRITON = Elementwise(TritonNormed, TritonGated, TritonMask)


def compare_with_eager(device: torch.device) -> None:
    """Run every kernel once on a device, on small tensors.

    Raises:
        AssertionError: values or gradients are not those of the eager operations.
        Exception: the compiler's, for a kernel that cannot run there.
    """
    assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    random = torch.Generator().manual_seed(0)
    left, right, grad = torch.randn(3, 6, 48, generator=random).to(device)
    sources: Any = Normed(left, right[0], right[1], 2, 1e-5), Gated(left, right)
    for source, kernels in zip(sources, (TritonNormed(*sources[0]), TritonGated(*sources[1])), strict=True):
        assert_close(kernels.forward(), source.forward())
        needed: Any = type(source)(*(False for _ in source))
        for got, wanted in zip(
            *(s.backward(grad.clone(), s.recompute()[1], needed) for s in (kernels, source)), strict=True
        ):
            assert_close(got, wanted)
    heads, order = left.unflatten(1, (2, 24)), torch.arange(5, -1, -1, device=device)
    angles_ND = right[:, :12].repeat(1, 2)
    angles = angles_ND.cos(), angles_ND.sin()
    rotated = triton_rope_and_reorder(heads, order, order, *angles)
    assert_close(rotated, rope_and_reorder(heads, order, order, *angles))
    mask = TritonMask(1, left, 0.5)
    assert_close(mask.add_dropped(right.clone(), left), right + mask.drop(left))


def triton_rope_and_reorder(
    x_NhD: torch.Tensor,
    to_sequence: torch.Tensor | None,
    to_sorted: torch.Tensor | None,
    cos_ND: torch.Tensor | None = None,
    sin_ND: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attention.rope_and_reorder`, by one kernel forward and one backward."""
    if cos_ND is None:  # reordering alone is one kernel of torch's
        return rope_and_reorder(x_NhD, to_sequence, to_sorted)
    ordered_NhD = _RopeAndReorder.apply(x_NhD, to_sequence, to_sorted, cos_ND, sin_ND)
    assert isinstance(ordered_NhD, torch.Tensor)
    return ordered_NhD


class _RopeAndReorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NhD: torch.Tensor, to_sequence: Any, to_sorted: Any, cos: Any, sin: Any) -> torch.Tensor:
        ctx.save_for_backward(to_sorted, cos, sin)
        return _rope(x_NhD, to_sequence, cos, sin, of_source=True, sign=1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _rope(grads[0], *ctx.saved_tensors, of_source=False, sign=-1), None, None, None, None


def _rope(
    x_NhD: torch.Tensor,
    order: torch.Tensor | None,
    cos_ND: torch.Tensor,
    sin_ND: torch.Tensor,
    *,
    of_source: bool,
    sign: int,
) -> torch.Tensor:
    """Rows of x in an order, rotated by the angles of the row that each was (`of_source`) or becomes."""
    rows, heads, size = x_NhD.shape
    if x_NhD.stride()[1:] != (size, 1):
        x_NhD = x_NhD.contiguous()
    out_NhD = torch.empty((rows, heads, size), dtype=x_NhD.dtype, device=x_NhD.device)
    if rows:
        sizes = {"HEADS": heads, "HALF": size // 2, "BLOCK_H": triton.next_power_of_2(heads)}
        sizes["BLOCK_D"] = triton.next_power_of_2(size // 2)
        tensors = x_NhD, cos_ND if order is None else order, cos_ND.contiguous(), sin_ND.contiguous(), out_NhD
        how = {"ANGLES_OF_SOURCE": of_source, "REORDER": order is not None, "SIGN": sign}
        _launch(rope_kernel, (rows,), *tensors, x_NhD.stride(0), **how, **sizes)
    return out_NhD
