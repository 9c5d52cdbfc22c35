"""A faster `linear.plain_project`: the same values and gradients, with less memory and fewer operations.

Backward recomputes the layers' input, so no norm's output, SiLU(gate) * up or reordered copy is saved for it. The A
matrices of all layers are multiplied at once, and so are frozen weights that lie one behind another in memory
(`stack_frozen_weights` puts them there). Guarantees (test_forward.py, test_speed.py): no number changes beyond
rounding.

Layers with simple LoRA are fused; a group with any other layer (DoRA, dropout while training, several adapters) runs
plainly.

Shapes: N rows, H input width, O output width, r rank of LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import islice, pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from higgs_tune.train.model.layer_input import Grads, Source
from higgs_tune.train.model.linear import AnyLayer, Layer, layer_of, plain_project
from torch import nn


def product(
    x_NI: torch.Tensor, weight_OI: torch.Tensor, plus_NO: torch.Tensor | None = None, *, overwrite: bool = False
) -> torch.Tensor:
    """x W^T, plus `plus_NO` if given, which is overwritten if `overwrite`; without gradient."""
    if x_NI.device.type == "cpu" and x_NI.dtype == torch.float32 and x_NI.numel() and _has_onednn():
        y_NO = _onednn_product(x_NI, weight_OI)
        return y_NO if plus_NO is None else y_NO.add_(plus_NO)
    if plus_NO is None:
        return F.linear(x_NI, weight_OI)
    return plus_NO.addmm_(x_NI, weight_OI.t()) if overwrite else torch.addmm(plus_NO, x_NI, weight_OI.t())


def _onednn_product(x_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x W^T by oneDNN, which on a CPU takes 5 to 30 % less time than MKL, which F.linear calls.

    The operator is torch's own and may go; `product` takes F.linear where it is missing.
    """
    return torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, None, "none", [], "")


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def fused_project(
    source: Source, layers: Sequence[AnyLayer], residual_NO: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """`plain_project` with less memory and fewer operations; see the top of this file."""
    simple = [layer for layer in layers if isinstance(layer, Layer)]
    if len(simple) < len(layers):
        return plain_project(source, layers, residual_NO)
    stacked = _stacked([layer.weight_OH for layer in simple])
    fields = (field for part in (source, *simple) for field in part)
    return list(_FusedProject.apply(type(source), stacked, residual_NO, *fields))


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
    """Move the frozen weights of linear layers with the same input into one block, in order; values stay the same.

    Layers that train, or differ in dtype or device, are left alone.
    """
    simple = [layer for layer in map(layer_of, modules) if layer is not None]
    weights = [layer.weight_OH for layer in simple]
    if len(weights) < len(modules) or any(weight.requires_grad for weight in weights) or _stacked(weights) is not None:
        return
    if len({(weight.dtype, weight.device, weight.shape[1]) for weight in weights}) > 1:
        return
    block = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, block.split([len(weight) for weight in weights]), strict=True):
        weight.data = part


def _stacked(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One view [sum of O, H] over weights that lie one behind another in one storage; None for others."""
    if len(weights) < 2 or any(weight.requires_grad for weight in weights):
        return None
    first, width = weights[0], weights[0].shape[1]
    storage = first.untyped_storage().data_ptr()
    for before, after in pairwise(weights):
        end = before.storage_offset() + before.numel()
        if after.untyped_storage().data_ptr() != storage or after.storage_offset() != end or after.shape[1] != width:
            return None
    return first.detach().as_strided((sum(len(weight) for weight in weights), width), (width, 1))


class _FusedProject(torch.autograd.Function):
    """The layers of `fused_project`. `apply` takes the fields of the source, then those of each layer, in a row."""

    @staticmethod
    def forward(
        ctx: Any, kind: type[Source], stacked: torch.Tensor | None, residual_NO: torch.Tensor | None, *fields: Any
    ) -> tuple[torch.Tensor, ...]:
        source, layers = _grouped(kind, fields)
        x_NH = source.forward()
        outputs = _base_outputs(x_NH, layers, stacked, residual_NO)
        low_Nr = _low_rank(x_NH, layers)
        for layer, y_NO, low_part_Nr in zip(layers, outputs, _by_rank(low_Nr, layers, 1), strict=True):
            if layer.bias_O is not None:
                y_NO.add_(layer.bias_O)
            if layer.b_Or is not None:
                y_NO.addmm_(low_part_Nr, layer.b_Or.to(x_NH.dtype).t(), alpha=layer.scaling)
        ctx.kind = kind
        _save(ctx, [*fields, low_Nr])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        *fields, low_Nr = _saved(ctx)
        source, layers = _grouped(ctx.kind, fields)
        _, _, needs_residual, *needs = ctx.needs_input_grad
        needed_source, needed_layers = _grouped(ctx.kind, needs)
        x_NH, recomputed = source.recompute()
        grad_low_Nr = _low_rank_grad(grads, layers, low_Nr)
        grad_a = _by_rank(product(grad_low_Nr.t(), x_NH.t()), layers, 0) if low_Nr.shape[1] else [None] * len(layers)
        low_parts = _by_rank(low_Nr, layers, 1)
        of_layers: Grads = []
        for layer, needed, grad_NO, low_part_Nr, grad_a_rH in zip(
            layers, needed_layers, grads, low_parts, grad_a, strict=True
        ):
            of_layers += _layer_grads(layer, needed, grad_NO, x_NH, low_part_Nr, grad_a_rH)
        of_source: Grads = [None] * len(needed_source)
        if any(needed_source):
            of_source = source.backward(_input_grad(grads, layers, grad_low_Nr), recomputed, needed_source)
        return (None, None, grads[0] if needs_residual else None, *of_source, *of_layers)


def _grouped(kind: type[Source], fields: Iterable[Any]) -> tuple[Any, list[Layer]]:
    """Source and layers from their fields in a row (or from one value for each field, such as `needs_input_grad`)."""
    rest = iter(fields)
    source = kind(*islice(rest, len(kind._fields)))
    return source, [Layer(*values) for values in zip(*[rest] * len(Layer._fields), strict=True)]


def _base_outputs(
    x_NH: torch.Tensor, layers: Sequence[Layer], stacked: torch.Tensor | None, residual_NO: torch.Tensor | None
) -> Sequence[torch.Tensor]:
    """x W^T of every layer; plus the residual, which comes with a single layer."""
    if stacked is not None:
        return product(x_NH, stacked).split([len(layer.weight_OH) for layer in layers], 1)
    return [product(x_NH, layer.weight_OH.to(x_NH.dtype), residual_NO) for layer in layers]


def _low_rank(x_NH: torch.Tensor, layers: Sequence[Layer]) -> torch.Tensor:
    """x A^T of every layer with LoRA, side by side: [N, sum of r]."""
    stacked_rH = _stacked_a(layers)
    return x_NH.new_zeros(len(x_NH), 0) if stacked_rH is None else product(x_NH, stacked_rH.to(x_NH.dtype))


def _stacked_a(layers: Sequence[Layer]) -> torch.Tensor | None:
    """The A matrices of all layers [sum of r, H]; None if no layer has LoRA."""
    parts = [layer.a_rH for layer in layers if layer.a_rH is not None]
    return torch.cat(parts) if parts else None


def _by_rank(values: torch.Tensor, layers: Sequence[Layer], dim: int) -> Sequence[torch.Tensor]:
    """Each layer's part of a tensor that holds the ranks of all layers side by side; empty without LoRA."""
    return values.split([layer.rank for layer in layers], dim)


def _low_rank_grad(grads: Sequence[torch.Tensor], layers: Sequence[Layer], low_Nr: torch.Tensor) -> torch.Tensor:
    """Gradient of `_low_rank`'s output: scaling grad B of each layer, side by side [N, sum of r]."""
    grad_low_Nr = torch.empty_like(low_Nr)
    for layer, grad_NO, part_Nr in zip(layers, grads, _by_rank(grad_low_Nr, layers, 1), strict=True):
        if layer.b_Or is not None:
            part_Nr.copy_(product(grad_NO, layer.b_Or.to(grad_NO.dtype).t())).mul_(layer.scaling)
    return grad_low_Nr


def _input_grad(grads: Sequence[torch.Tensor], layers: Sequence[Layer], grad_low_Nr: torch.Tensor) -> torch.Tensor:
    """Gradient of the input: the sum of grad W over the layers, plus what comes through LoRA."""
    grad_x_NH: torch.Tensor | None = None
    for layer, grad_NO in zip(layers, grads, strict=True):
        grad_x_NH = product(grad_NO, layer.weight_OH.to(grad_NO.dtype).t(), grad_x_NH, overwrite=True)
    assert grad_x_NH is not None
    stacked_rH = _stacked_a(layers)
    return grad_x_NH if stacked_rH is None else grad_x_NH.addmm_(grad_low_Nr, stacked_rH.to(grad_x_NH.dtype))


def _layer_grads(
    layer: Layer,
    needed: Layer,
    grad_NO: torch.Tensor,
    x_NH: torch.Tensor,
    low_Nr: torch.Tensor,
    grad_a_rH: torch.Tensor | None,
) -> Grads:
    """Gradients of a layer's tensors, in the order of its fields.

    Args:
        needed: for each field, whether its gradient is needed.
        low_Nr: x A^T of this layer.
    """
    weight = (grad_NO.t() @ x_NH).to(layer.weight_OH.dtype) if needed.weight_OH else None
    bias = grad_NO.sum(0).to(layer.bias_O.dtype) if needed.bias_O and layer.bias_O is not None else None
    a = grad_a_rH.to(layer.a_rH.dtype) if needed.a_rH and grad_a_rH is not None and layer.a_rH is not None else None
    b = None
    if needed.b_Or and layer.b_Or is not None:
        b = (grad_NO.t() @ low_Nr).mul_(layer.scaling).to(layer.b_Or.dtype)
    return [weight, bias, a, b, None]


def _save(ctx: Any, values: Sequence[Any]) -> None:
    """Keep tensors through autograd, which checks that nobody writes to them, and other values beside them."""
    ctx.others = [None if isinstance(value, torch.Tensor) else (value,) for value in values]
    ctx.save_for_backward(*(value for value in values if isinstance(value, torch.Tensor)))


def _saved(ctx: Any) -> list[Any]:
    """The values of `_save`, in order."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if other is None else other[0] for other in ctx.others]
