"""A faster `linear.plain_project`: the same values and gradients, with less memory and fewer operations.

Backward recomputes the layers' input, so no norm's output, SiLU(gate) * up or reordered copy is saved for it. The A
matrices of all layers are multiplied at once, and so are frozen weights that lie one behind another in memory
(`stack_frozen_weights` puts them there). Guarantees (test_forward.py, test_speed.py, test_lora_paths.py): no number
changes beyond rounding.

Every layer that the trainer makes is fused: LoRA, rsLoRA and DoRA, with and without dropout (`lora_math.py`).
`linear.layer_of` names the few of PEFT that are not; a group with one of them runs plainly.

Shapes: N rows, H input width, O output width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple

import torch
from higgs_tune.train.model.dropout import Mask, new_seed
from higgs_tune.train.model.layer_input import Gated, Grads, Normed, Source
from higgs_tune.train.model.linear import AnyLayer, Layer, any_dropout, layer_of, plain_project
from higgs_tune.train.model.lora_math import Kept, MaskMaker, layer_grads, run_layers
from higgs_tune.train.model.quantized import QuantizedWeight
from torch import nn


class Elementwise(NamedTuple):
    """What runs beside the products: norms, gated products and the mask of dropout."""

    normed: type[Normed]
    gated: type[Gated]
    mask: type[Mask]

    def kind_of(self, source: Source) -> type[Source]:
        return self.normed if isinstance(source, Normed) else self.gated if isinstance(source, Gated) else type(source)


EAGER = Elementwise(Normed, Gated, Mask)


def fused_project(
    source: Source,
    layers: Sequence[AnyLayer],
    residual_NO: torch.Tensor | None = None,
    *,
    elementwise: Elementwise = EAGER,
) -> list[torch.Tensor]:
    """`plain_project` with less memory and fewer operations; see the top of this file."""
    simple = fusible(layers)
    if simple is None:
        return plain_project(source, layers, residual_NO)
    stacked = _stacked([layer.weight_OH for layer in simple])
    mask_of = partial(elementwise.mask, new_seed()) if any_dropout(simple) else None
    fields = (field for part in (source, *simple) for field in part)
    return list(_FusedProject.apply(elementwise.kind_of(source), stacked, residual_NO, mask_of, *fields))


def fusible(layers: Sequence[AnyLayer]) -> list[Layer] | None:
    """The layers, if `fused_project` runs them fused: all of them are `Layer`s, and those with LoRA drop alike."""
    simple = [layer for layer in layers if isinstance(layer, Layer)]
    drops_alike = len({layer.dropout for layer in simple if layer.rank}) <= 1
    return simple if len(simple) == len(layers) and drops_alike else None


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

    Layers that train, that are quantized, or that differ in dtype or device, are left alone.
    """
    simple = [layer for layer in map(layer_of, modules) if layer is not None]
    weights = [layer.weight_OH for layer in simple]
    if len(weights) < len(modules) or any(weight.requires_grad for weight in weights) or _stacked(weights) is not None:
        return
    quantized = any(isinstance(weight, QuantizedWeight) for weight in weights)
    if quantized or len({(weight.dtype, weight.device, weight.shape[1]) for weight in weights}) > 1:
        return
    block = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, block.split([len(weight) for weight in weights]), strict=True):
        weight.data = part


def _stacked(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One view [sum of O, H] over weights that lie one behind another in one storage; None for others."""
    if len(weights) < 2 or any(weight.requires_grad or isinstance(weight, QuantizedWeight) for weight in weights):
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
        ctx: Any,
        kind: type[Source],
        stacked: torch.Tensor | None,
        residual_NO: torch.Tensor | None,
        mask_of: MaskMaker | None,
        *fields: Any,
    ) -> tuple[torch.Tensor, ...]:
        source, layers = _grouped(kind, fields)
        outputs, kept = run_layers(source.forward(), layers, stacked, residual_NO, mask_of)
        ctx.kind, ctx.mask_of, ctx.count = kind, mask_of, len(layers)
        _save(ctx, [*fields, kept.low_Nr, kept.a_rH, *kept.b, *kept.scales, *kept.parts])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        values, count = _saved(ctx), ctx.count
        fields, (low_Nr, a_rH, *of_layers) = values[: -3 * count - 2], values[-3 * count - 2 :]
        b, scales, parts = (of_layers[at * count : (at + 1) * count] for at in range(3))
        kept = Kept(low_Nr, a_rH, b, scales, parts)
        source, layers = _grouped(ctx.kind, fields)
        _, _, needs_residual, _, *needs = ctx.needs_input_grad
        needed_source, needed_layers = _grouped(ctx.kind, needs)
        x_NH, recomputed = source.recompute()
        grad_x_NH, grads_of_layers = layer_grads(
            grads, x_NH, layers, kept, needed_layers, ctx.mask_of, needs_input=any(needed_source)
        )
        of_source: Grads = [None] * len(needed_source)
        if grad_x_NH is not None:
            of_source = source.backward(grad_x_NH, recomputed, needed_source)
        return (None, None, grads[0] if needs_residual else None, None, *of_source, *chain(*grads_of_layers))


def _grouped(kind: type[Source], fields: Iterable[Any]) -> tuple[Any, list[Layer]]:
    """Source and layers from their fields in a row (or from one value for each field, such as `needs_input_grad`)."""
    rest = iter(fields)
    source = kind(*islice(rest, len(kind._fields)))
    return source, [Layer(*values) for values in zip(*[rest] * len(Layer._fields), strict=True)]


def _save(ctx: Any, values: Sequence[Any]) -> None:
    """Keep tensors through autograd, which checks that nobody writes to them, and other values beside them."""
    ctx.others = [None if isinstance(value, torch.Tensor) else (value,) for value in values]
    ctx.save_for_backward(*(value for value in values if isinstance(value, torch.Tensor)))


def _saved(ctx: Any) -> list[Any]:
    """The values of `_save`, in order."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if other is None else other[0] for other in ctx.others]
