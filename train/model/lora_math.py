"""LoRA beside a frozen weight, and its gradients, for layers that read one input: dropout, DoRA, any rank.

In: rows, and the tensors of linear layers. Out: their outputs; in backward, gradients of the rows and of every tensor.
Both functions run without autograd; `fused_linear.py` and the heads of `loss.py` call them. Guarantees
(test_lora_paths.py): PEFT's values and gradients under the same dropout masks.

A layer computes, with g = magnitude / |W + s B A| (a factor of each output; DoRA, https://arxiv.org/abs/2402.09353,
section 4.3: the norm counts as a constant), and d(x) the input after dropout:

    LoRA  y = W x + bias + s B A d(x)
    DoRA  y = W x + bias + (g - 1) W d(x) + g s B A d(x),   without dropout y = g (W x + s B A x) + bias

Layers that read one input share its dropout mask, which backward draws again from its seed (`dropout.py`).

Shapes: N rows, H input width, O output width, r rank of LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from higgs_tune.train.model.dropout import Mask
from higgs_tune.train.model.layer_input import Grads
from higgs_tune.train.model.linear import Layer
from higgs_tune.train.model.products import product, scaled_product

Maybe = torch.Tensor | None
MaskMaker = Callable[[torch.Tensor, float], Mask]  # from rows like those that are dropped from, and the share


class Kept(NamedTuple):
    """What backward needs beside the input: for each layer, or for all.

    low_Nr: A d(x) of every layer, side by side. a_rH, b: the A matrices, one below another, and each B matrix [O, r],
    in the dtype of the rows. scales: DoRA's g [O], or None. parts: the term of DoRA whose product with the gradient
    gives the magnitude's [N, O], or None.
    """

    low_Nr: torch.Tensor
    a_rH: Maybe
    b: list[Maybe]
    scales: list[Maybe]
    parts: list[Maybe]


def run_layers(
    x_NH: torch.Tensor,
    layers: Sequence[Layer],
    stacked: Maybe = None,
    residual_NO: Maybe = None,
    mask_of: MaskMaker | None = None,
    scales: list[Maybe] | None = None,
) -> tuple[list[torch.Tensor], Kept]:
    """Outputs of the layers [N, O].

    Args:
        stacked: all weights as one tensor, where they lie one behind another.
        residual_NO: added to the output of a single layer.
        mask_of: makes the dropout mask; needed where a layer has dropout.
        scales: from `dora_scales`, if they are known.
    """
    scales = dora_scales(layers) if scales is None else scales
    share = max(layer.dropout for layer in layers)
    late = residual_NO if scales[0] is not None else None
    outputs = _base_outputs(x_NH, layers, stacked, None if late is not None else residual_NO)
    read_NH = mask_of(x_NH, share).drop(x_NH) if share and mask_of else x_NH
    a_rH, b = _matrices(layers, x_NH.dtype)
    low_Nr = x_NH.new_zeros(len(x_NH), 0) if a_rH is None else product(read_NH, a_rH)
    parts: list[Maybe] = []
    each = zip(layers, b, by_rank(low_Nr, layers), scales, strict=True)
    for number, (layer, b_Or, low_part_Nr, scale_O) in enumerate(each):
        y_NO, part_NO = outputs[number], None
        if b_Or is None:
            pass
        elif scale_O is None:
            _add_low_rank(y_NO, low_part_Nr, b_Or, layer)
        elif share:
            part_NO = product(read_NH, layer.weight_OH.to(x_NH.dtype)).mul_(1 / (1 - share))
            y_NO.sub_(part_NO)
            y_NO.addcmul_(_add_low_rank(part_NO, low_part_Nr, b_Or, layer), scale_O.to(y_NO.dtype))
        else:
            part_NO = _add_low_rank(y_NO, low_part_Nr, b_Or, layer).mul_(scale_O.to(y_NO.dtype))
            if late is not None or layer.bias_O is not None:
                y_NO = outputs[number] = part_NO.clone()
        if layer.bias_O is not None:
            y_NO.add_(layer.bias_O.to(y_NO.dtype))
        if late is not None:
            y_NO.add_(late)
        parts.append(part_NO)
    return outputs, Kept(low_Nr, a_rH, b, scales, parts)


def layer_grads(
    grads: Sequence[torch.Tensor],
    x_NH: torch.Tensor,
    layers: Sequence[Layer],
    kept: Kept,
    needed: Sequence[Layer],
    mask_of: MaskMaker | None = None,
    *,
    needs_input: bool = True,
) -> tuple[Maybe, list[Grads]]:
    """Gradient of the input [N, H], and for each layer those of its tensors, in the order of its fields.

    Args:
        grads: of the outputs.
        needed: for each layer and field, whether its gradient is needed.
        mask_of: that of `run_layers`.
    """
    share = max(layer.dropout for layer in layers)
    mask = mask_of(x_NH, share) if share and mask_of else None
    read_NH = x_NH if mask is None else mask.drop(x_NH)
    scaled = [
        grad_NO if scale_O is None else grad_NO * scale_O.to(grad_NO.dtype)
        for grad_NO, scale_O in zip(grads, kept.scales, strict=True)
    ]
    grad_low_Nr = _low_rank_grad(scaled, layers, kept)
    a_rH = kept.a_rH
    grad_a = [None] * len(layers) if a_rH is None else by_rank(product(grad_low_Nr.t(), read_NH.t()), layers, 0)
    of_layers = [
        _tensor_grads(layer, wanted, grads[i], scaled[i], x_NH, read_NH, low_Nr, kept.parts[i], grad_a[i])
        for i, (layer, wanted, low_Nr) in enumerate(zip(layers, needed, by_rank(kept.low_Nr, layers), strict=True))
    ]
    if not needs_input:
        return None, of_layers
    through_base = grads if share else scaled
    grad_x_NH = _sum_of_products(through_base, layers)
    assert grad_x_NH is not None
    if a_rH is None:
        return grad_x_NH, of_layers
    if mask is None:
        return grad_x_NH.addmm_(grad_low_Nr, a_rH), of_layers
    is_dora = [number for number, scale_O in enumerate(kept.scales) if scale_O is not None]
    extra = [(scaled[number] - grads[number]).mul_(1 / (1 - share)) for number in is_dora]
    grad_read_NH = _sum_of_products(extra, [layers[number] for number in is_dora])
    low_NH = grad_low_Nr @ a_rH if grad_read_NH is None else grad_read_NH.addmm_(grad_low_Nr, a_rH)
    return mask.add_dropped(grad_x_NH, low_NH), of_layers


@torch.no_grad()
def dora_scales(layers: Sequence[Layer]) -> list[Maybe]:
    """DoRA's g = magnitude / |W + s B A| of each layer, float32 [O]; None without DoRA."""
    return [None if layer.magnitude_O is None else layer.magnitude_O.float() / _norm(layer) for layer in layers]


def _norm(layer: Layer) -> torch.Tensor:
    """The norm of each row of W + s B A [O], from products that are as wide as the rank."""
    a_rH, b_Or, weight_OH = layer.a_rH, layer.b_Or, layer.weight_OH
    assert a_rH is not None
    assert b_Or is not None
    scaled_Or, used_rH = b_Or.float() * layer.scaling, a_rH.float()
    cross_Or = F.linear(weight_OH, a_rH.to(weight_OH.dtype)).float()
    square_O = torch.linalg.vector_norm(weight_OH, dim=1, dtype=torch.float32).square()
    square_O += (scaled_Or * (2 * cross_Or + scaled_Or @ (used_rH @ used_rH.t()))).sum(1)
    return square_O.clamp_(min=0).sqrt_()


def _base_outputs(
    x_NH: torch.Tensor, layers: Sequence[Layer], stacked: Maybe, residual_NO: Maybe
) -> list[torch.Tensor]:
    """W x of every layer; plus the residual, which comes with a single layer."""
    if stacked is not None:
        return list(product(x_NH, stacked).split([len(layer.weight_OH) for layer in layers], 1))
    return [product(x_NH, layer.weight_OH.to(x_NH.dtype), residual_NO) for layer in layers]


def _matrices(layers: Sequence[Layer], dtype: torch.dtype) -> tuple[Maybe, list[Maybe]]:
    """The A matrices of all layers that have LoRA, one below another [sum of r, H], and each layer's B, in a dtype."""
    a = [layer.a_rH for layer in layers if layer.a_rH is not None]
    stacked_rH = None if not a else a[0] if len(a) == 1 else torch.cat(a)
    b = [None if layer.b_Or is None else layer.b_Or.to(dtype) for layer in layers]
    return None if stacked_rH is None else stacked_rH.to(dtype), b


def by_rank(values: torch.Tensor, layers: Sequence[Layer], dim: int = 1) -> Sequence[torch.Tensor]:
    """Each layer's part of a tensor that holds the ranks of all layers side by side; empty without LoRA."""
    return [values] if len(layers) == 1 else values.split([layer.rank for layer in layers], dim)


def _add_low_rank(y_NO: torch.Tensor, low_Nr: torch.Tensor, b_Or: torch.Tensor, layer: Layer) -> torch.Tensor:
    """s B times A's output, added in place."""
    return y_NO.addmm_(low_Nr, b_Or.t(), alpha=layer.scaling / (1 - layer.dropout))


def _low_rank_grad(scaled: Sequence[torch.Tensor], layers: Sequence[Layer], kept: Kept) -> torch.Tensor:
    """Gradient of A's output: s grad B of each layer, side by side [N, sum of r]."""
    grad_low_Nr = torch.empty_like(kept.low_Nr)
    parts = by_rank(grad_low_Nr, layers)
    for layer, grad_NO, b_Or, part_Nr in zip(layers, scaled, kept.b, parts, strict=True):
        if b_Or is not None:
            scaled_product(grad_NO, b_Or.t(), layer.scaling / (1 - layer.dropout), part_Nr)
    return grad_low_Nr


def _sum_of_products(grads: Sequence[torch.Tensor], layers: Sequence[Layer]) -> Maybe:
    """The sum of grad W over the layers [N, H]; None without layers."""
    total_NH: Maybe = None
    for layer, grad_NO in zip(layers, grads, strict=True):
        total_NH = product(grad_NO, layer.weight_OH.to(grad_NO.dtype).t(), total_NH, overwrite=True)
    return total_NH


def _tensor_grads(
    layer: Layer,
    needed: Layer,
    grad_NO: torch.Tensor,
    scaled_NO: torch.Tensor,
    x_NH: torch.Tensor,
    read_NH: torch.Tensor,
    low_Nr: torch.Tensor,
    part_NO: Maybe,
    grad_a_rH: Maybe,
) -> Grads:
    """Gradients of a layer's tensors, in the order of its fields."""
    weight = bias = a = b = magnitude = None
    if needed.weight_OH and layer.dropout and part_NO is not None:
        weight = grad_NO.t() @ x_NH + (scaled_NO - grad_NO).t() @ read_NH / (1 - layer.dropout)
    elif needed.weight_OH:
        weight = scaled_NO.t() @ x_NH
    if needed.bias_O:
        bias = grad_NO.sum(0)
    if needed.a_rH:
        a = grad_a_rH
    if needed.b_Or:
        b = scaled_product(scaled_NO.t(), low_Nr.t(), layer.scaling / (1 - layer.dropout))
    if needed.magnitude_O and part_NO is not None and layer.magnitude_O is not None:
        # of g: grad times the term that g scales, which is kept with g in it where there is no dropout
        magnitude = ((scaled_NO if layer.dropout else grad_NO) * part_NO).sum(0, dtype=torch.float32)
        magnitude /= layer.magnitude_O.float()
    found = (weight, bias, a, b, magnitude)
    typed: Grads = [
        grad.to(of.dtype) if grad is not None and isinstance(of, torch.Tensor) else None
        for grad, of in zip(found, layer, strict=False)
    ]
    return [*typed, None, None]
