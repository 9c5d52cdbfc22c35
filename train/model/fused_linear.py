"""Linear layers with LoRA, several on one input, fused with what makes that input; the input is made again in backward.

In: the residual stream (or gate and up, or attention's output) and linear layers, with or without PEFT's LoRA. Out:
one tensor a layer. Never: a norm's output, SiLU(gate) * up or a reordered copy kept for backward; PEFT's per-call
casts; a weight of its own.

Frozen weights that stand one behind another in memory (`stack_frozen_weights` puts them there) are multiplied at once.
Whatever is not a plain linear layer or simple LoRA (DoRA, dropout while training, several adapters) runs by itself
through `lora.linear`, with autograd's own bookkeeping.

Shapes: N rows, P of them text rows, H input width, O output width, F FFN width, r rank of LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from higgs_tune.train.model.lora import linear
from peft.tuners.lora import LoraLayer
from torch import nn

Grads = list[torch.Tensor | None]
Recomputed = tuple[torch.Tensor, ...]  # what making a source again leaves for its gradient


def product(
    x_NI: torch.Tensor, weight_OI: torch.Tensor, plus_NO: torch.Tensor | None = None, *, overwrite: bool = False
) -> torch.Tensor:
    """x W^T, and `plus_NO` added, which may be overwritten if allowed; without gradient.

    On a CPU oneDNN takes 5 to 30 % less time for it than MKL, which F.linear calls.
    """
    on_cpu = x_NI.device.type == "cpu" and x_NI.dtype == torch.float32
    if on_cpu and x_NI.numel() and _has_onednn() and not torch.compiler.is_compiling():
        y_NO = torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, None, "none", [], "")
        return y_NO if plus_NO is None else y_NO.add_(plus_NO)
    if plus_NO is None:
        return F.linear(x_NI, weight_OI)
    return plus_NO.addmm_(x_NI, weight_OI.t()) if overwrite else torch.addmm(plus_NO, x_NI, weight_OI.t())


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Rows(NamedTuple):
    """Rows as they are, or those `at` some; `back` is the inverse where they are a permutation."""

    x_NH: torch.Tensor
    at: torch.Tensor | None = None
    back: torch.Tensor | None = None

    def forward(self) -> torch.Tensor:
        return self.x_NH if self.at is None else self.x_NH.index_select(0, self.at)

    def recompute(self) -> tuple[torch.Tensor, Recomputed]:
        return self.forward(), ()

    def backward(self, grad_NH: torch.Tensor, _kept: Recomputed, _needed: Sequence[bool]) -> Grads:
        if self.back is not None:
            grad_NH = grad_NH.index_select(0, self.back)
        elif self.at is not None:
            grad_NH = grad_NH.new_zeros(self.x_NH.shape).index_copy_(0, self.at.long(), grad_NH)
        return [grad_NH, None, None]


class Normed(NamedTuple):
    """RMSNorm (https://arxiv.org/abs/1910.07467): the first `text_rows` rows by one weight, the others by another."""

    x_NH: torch.Tensor
    weight_H: torch.Tensor
    audio_weight_H: torch.Tensor
    text_rows: int
    eps: float

    def forward(self) -> torch.Tensor:
        return self._weight(self._unit()[0].to(self.x_NH.dtype))

    def recompute(self) -> tuple[torch.Tensor, Recomputed]:
        unit_NH, scale_N1 = self._unit()
        return self._weight(unit_NH.to(self.x_NH.dtype, copy=True)), (unit_NH, scale_N1)

    def backward(self, grad_NH: torch.Tensor, kept: Recomputed, needed: Sequence[bool]) -> Grads:
        unit_NH, scale_N1 = kept
        of_weights: Grads = [None, None]
        for number, part in enumerate((slice(0, self.text_rows), slice(self.text_rows, None))):
            if needed[1 + number]:
                weight = (self.weight_H, self.audio_weight_H)[number]
                of_weights[number] = (grad_NH[part] * unit_NH[part]).sum(0).to(weight.dtype)
        inner_NH = self._weight(grad_NH).to(unit_NH.dtype)
        inner_NH.addcmul_(unit_NH, (inner_NH * unit_NH).mean(-1, keepdim=True), value=-1).mul_(scale_N1)
        return [inner_NH.to(grad_NH.dtype), *of_weights, None, None]

    def _unit(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of unit mean square [N, H] and their factors [N, 1], in float32 or what is finer."""
        dtype = torch.promote_types(self.x_NH.dtype, torch.float32)
        norm_N1 = torch.linalg.vector_norm(self.x_NH, dim=-1, keepdim=True, dtype=dtype)
        scale_N1 = torch.rsqrt(norm_N1.square() / self.x_NH.shape[1] + self.eps)
        return self.x_NH * scale_N1, scale_N1

    def _weight(self, x_NH: torch.Tensor) -> torch.Tensor:
        """Each row times its weight; in place where autograd does not watch."""
        text, audio = self.weight_H.to(x_NH.dtype), self.audio_weight_H.to(x_NH.dtype)
        parts = x_NH[: self.text_rows], x_NH[self.text_rows :]
        if torch.is_grad_enabled():
            return torch.cat([parts[0] * text, parts[1] * audio])
        parts[0].mul_(text)
        parts[1].mul_(audio)
        return x_NH


class Gated(NamedTuple):
    """SiLU(gate) * up (https://arxiv.org/abs/2002.05202)."""

    gate_NF: torch.Tensor
    up_NF: torch.Tensor

    def forward(self) -> torch.Tensor:
        silu_NF = F.silu(self.gate_NF)
        return silu_NF * self.up_NF if torch.is_grad_enabled() else silu_NF.mul_(self.up_NF)

    def recompute(self) -> tuple[torch.Tensor, Recomputed]:
        silu_NF = F.silu(self.gate_NF)
        return silu_NF * self.up_NF, (silu_NF,)

    def backward(self, grad_NF: torch.Tensor, kept: Recomputed, _needed: Sequence[bool]) -> Grads:
        of_up_NF = kept[0].mul_(grad_NF)
        return [torch.ops.aten.silu_backward(grad_NF.mul_(self.up_NF), self.gate_NF), of_up_NF]


Source = Rows | Normed | Gated


class Projection(NamedTuple):
    """A linear layer's tensors: y = x W^T + bias + scaling x A^T B^T."""

    weight_OH: torch.Tensor
    bias_O: torch.Tensor | None
    a_rH: torch.Tensor | None
    b_Or: torch.Tensor | None
    scaling: float

    def run(self, x_NH: torch.Tensor) -> torch.Tensor:
        """The layer by plain operations."""
        bias_O = None if self.bias_O is None else self.bias_O.to(x_NH.dtype)
        y_NO = F.linear(x_NH, self.weight_OH.to(x_NH.dtype), bias_O)
        if self.a_rH is None or self.b_Or is None:
            return y_NO
        return y_NO + F.linear(F.linear(x_NH, self.a_rH.to(x_NH.dtype)), self.b_Or.to(x_NH.dtype)) * self.scaling


Layer = Projection | nn.Module


def projection_of(module: nn.Module) -> Projection | None:
    """The tensors of a linear layer; None where it is more than a linear layer with simple LoRA."""
    if not isinstance(module, LoraLayer):
        plain: Any = module  # a linear layer, or peft's wrapper of one that is trained in full
        return Projection(plain.weight, plain.bias, None, None, 0.0)
    base: Any = module.get_base_layer()
    adapters = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or not adapters:
        return Projection(base.weight, base.bias, None, None, 0.0)
    name = adapters[0]
    dropout: Any = module.lora_dropout[name]
    drops = not isinstance(dropout, nn.Identity) and dropout.training
    if len(adapters) > 1 or module.merged or module.lora_variant or drops:
        return None
    a_rH, b_Or = module.lora_A[name].get_parameter("weight"), module.lora_B[name].get_parameter("weight")
    return Projection(base.weight, base.bias, a_rH, b_Or, module.scaling[name])


def layers_of(*modules: nn.Module) -> tuple[Layer, ...]:
    """Linear layers as tensors, where they are simple."""
    return tuple(projection_of(module) or module for module in modules)


def project(source: Source, layers: Sequence[Layer], residual_NO: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Run linear layers on what `source` makes: a list of [N, O].

    Args:
        layers: from `layers_of`.
        residual_NO: added to the output of a single layer.
    """
    simple = [layer for layer in layers if isinstance(layer, Projection)]
    if len(simple) < len(layers) or torch.compiler.is_compiling():  # a compiler sees for itself what to make again
        made_NH = source.forward()
        outputs = [layer.run(made_NH) if isinstance(layer, Projection) else linear(layer, made_NH) for layer in layers]
        return outputs if residual_NO is None else [residual_NO + outputs[0]]
    tensors = [tensor for projection in simple for tensor in projection[:4]]
    stacked = _stacked([projection.weight_OH for projection in simple])
    scalings = tuple(projection.scaling for projection in simple)
    return list(_Project.apply(type(source), len(source), scalings, stacked, residual_NO, *source, *tensors))


def stack_layer(layer: Any) -> None:
    """Stack queries, keys and values, and gate and up, of a decoder layer."""
    for name in ("self_attn", "audio_attn"):
        if hasattr(layer, name):
            attention = getattr(layer, name)
            stack_frozen_weights([attention.q_proj, attention.k_proj, attention.v_proj])
    for name in ("mlp", "audio_mlp"):
        if hasattr(layer, name):
            stack_frozen_weights([getattr(layer, name).gate_proj, getattr(layer, name).up_proj])


def stack_frozen_weights(modules: Sequence[nn.Module]) -> None:
    """Move the frozen weights of linear layers with the same input into one block, in order; they stay what they were.

    Layers that train, or differ in dtype or device, are left alone.
    """
    found = [projection_of(module) for module in modules]
    weights = [projection.weight_OH for projection in found if projection is not None]
    if len(weights) < len(modules) or any(weight.requires_grad for weight in weights) or _stacked(weights) is not None:
        return
    if len({(weight.dtype, weight.device, weight.shape[1]) for weight in weights}) > 1:
        return
    block = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, block.split([len(weight) for weight in weights]), strict=True):
        weight.data = part


def _stacked(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One view [sum of O, H] over weights that stand one behind another in one storage; None where they do not."""
    if len(weights) < 2 or any(weight.requires_grad for weight in weights):
        return None
    first, width = weights[0], weights[0].shape[1]
    storage = first.untyped_storage().data_ptr()
    for before, after in pairwise(weights):
        end = before.storage_offset() + before.numel()
        if after.untyped_storage().data_ptr() != storage or after.storage_offset() != end or after.shape[1] != width:
            return None
    return first.detach().as_strided((sum(len(weight) for weight in weights), width), (width, 1))


class _Project(torch.autograd.Function):
    """The linear layers of `project`; `apply` takes the source's fields, then four tensors a layer."""

    @staticmethod
    def forward(ctx: Any, kind: type, width: int, scalings: tuple[float, ...], stacked: Any, residual: Any,
                *given: Any) -> tuple[torch.Tensor, ...]:  # fmt: skip
        x_NH = kind(*given[:width]).forward()
        layers = [given[at : at + 4] for at in range(width, len(given), 4)]
        together = (
            product(x_NH, stacked).split([len(weight) for weight, *_ in layers], 1) if stacked is not None else ()
        )
        low_Nr = _lows(x_NH, [a_rH for _, _, a_rH, _ in layers])
        outputs, done = [], 0
        for number, (weight_OH, bias_O, a_rH, b_Or) in enumerate(layers):
            y_NO = together[number] if together else product(x_NH, weight_OH.to(x_NH.dtype), residual)
            if bias_O is not None:
                y_NO = y_NO.add_(bias_O)
            if a_rH is not None:
                part = slice(done, done := done + len(a_rH))
                y_NO = y_NO.addmm_(low_Nr[:, part], b_Or.to(x_NH.dtype).t(), alpha=scalings[number])
            outputs.append(y_NO)
        ctx.kind, ctx.width, ctx.scalings, ctx.layout = kind, width, scalings, []
        _save(ctx, [*given, low_Nr])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (*given, low_Nr), needed = _saved(ctx), ctx.needs_input_grad[5:]
        source = ctx.kind(*given[: ctx.width])
        (x_NH, kept), of_low_Nr = source.recompute(), torch.empty_like(low_Nr)
        wanted, of_x_NH = any(needed[: ctx.width]), None
        of_layers: list[Grads] = []
        parts: list[slice] = []
        for number, grad_NO in enumerate(grads):
            at = ctx.width + 4 * number
            weight_OH, bias_O, a_rH, b_Or = given[at : at + 4]
            if wanted:
                weight_OH = weight_OH.to(grad_NO.dtype)
                of_x_NH = product(grad_NO, weight_OH.t(), of_x_NH, overwrite=True)
            found: Grads = [None] * 4
            if needed[at]:
                found[0] = (grad_NO.t() @ x_NH).to(given[at].dtype)
            if bias_O is not None and needed[at + 1]:
                found[1] = grad_NO.sum(0).to(bias_O.dtype)
            done = parts[-1].stop if parts else 0
            parts.append(slice(done, done if a_rH is None else done + len(a_rH)))
            if a_rH is not None:
                of_low_Nr[:, parts[-1]] = product(grad_NO, b_Or.to(grad_NO.dtype).t()).mul_(ctx.scalings[number])
                if needed[at + 3]:
                    found[3] = (grad_NO.t() @ low_Nr[:, parts[-1]]).mul_(ctx.scalings[number]).to(b_Or.dtype)
            of_layers.append(found)
        adapted = [number for number, part in enumerate(parts) if part.stop > part.start]
        if adapted:
            if of_x_NH is not None:
                stacked_rH = torch.cat([given[ctx.width + 4 * number + 2] for number in adapted]).to(x_NH.dtype)
                of_x_NH = of_x_NH.addmm_(of_low_Nr, stacked_rH)
            of_a_rH = product(of_low_Nr.t(), x_NH.t())
            for number in adapted:
                if needed[ctx.width + 4 * number + 2]:
                    of_layers[number][2] = of_a_rH[parts[number]].to(given[ctx.width + 4 * number + 2].dtype)
        of_source = [None] * ctx.width if of_x_NH is None else source.backward(of_x_NH, kept, needed)
        residual = grads[0] if ctx.needs_input_grad[4] else None
        return (None, None, None, None, residual, *of_source, *(grad for found in of_layers for grad in found))


def _lows(x_NH: torch.Tensor, a_matrices: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The input times the A matrices of every adapted layer, side by side: [N, sum of r]."""
    there = [a_rH for a_rH in a_matrices if a_rH is not None]
    if not there:
        return x_NH.new_zeros(len(x_NH), 0)
    return product(x_NH, torch.cat(there).to(x_NH.dtype))


def _save(ctx: Any, values: Sequence[Any]) -> None:
    """Keep tensors through autograd, which checks that nobody writes to them, and other values beside them."""
    ctx.layout = [None if isinstance(value, torch.Tensor) else (value,) for value in values]
    ctx.save_for_backward(*(value for value in values if isinstance(value, torch.Tensor)))


def _saved(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if other is None else other[0] for other in ctx.layout]
