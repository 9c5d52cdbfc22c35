"""Linear layers with PEFT's LoRA, by plain operations, in the dtype of the activations.

What trains is kept in float32 and used in the activations' dtype. `fused_linear.py` computes the same faster.

Shapes: N rows, H input width, O output width, r rank of LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from higgs_tune.train.model.layer_input import Source
from peft.tuners.lora import LoraLayer
from torch import nn


class Layer(NamedTuple):
    """The tensors of a linear layer with simple LoRA: y = x W^T + bias + scaling x A^T B^T."""

    weight_OH: torch.Tensor
    bias_O: torch.Tensor | None = None
    a_rH: torch.Tensor | None = None
    b_Or: torch.Tensor | None = None
    scaling: float = 0.0

    @property
    def rank(self) -> int:
        """0 without LoRA."""
        return 0 if self.a_rH is None else len(self.a_rH)


AnyLayer = Layer | nn.Module
ROWS = 8  # a multiple of this is multiplied at once


def layer_of(module: nn.Module) -> Layer | None:
    """The tensors of a linear layer; None for anything but a linear layer with simple LoRA."""
    if not isinstance(module, LoraLayer):
        plain: Any = module  # a linear layer, or peft's wrapper of one that is trained in full
        return Layer(plain.weight, plain.bias)
    base: Any = module.get_base_layer()
    adapters = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or not adapters:
        return Layer(base.weight, base.bias)
    name = adapters[0]
    dropout: Any = module.lora_dropout[name]
    drops = not isinstance(dropout, nn.Identity) and dropout.training
    if len(adapters) > 1 or module.merged or module.lora_variant or drops:
        return None
    a_rH, b_Or = module.lora_A[name].get_parameter("weight"), module.lora_B[name].get_parameter("weight")
    return Layer(base.weight, base.bias, a_rH, b_Or, module.scaling[name])


def layers_of(*modules: nn.Module) -> tuple[AnyLayer, ...]:
    """The tensors of linear layers; a module that is not simple stays a module."""
    return tuple(layer_of(module) or module for module in modules)


def plain_project(
    source: Source, layers: Sequence[AnyLayer], residual_NO: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Run linear layers on the source by plain operations: a list of [N, O].

    Args:
        layers: from `layers_of`.
        residual_NO: added to the output of a single layer.
    """
    x_NH = source.forward()
    outputs = [linear(layer, x_NH) for layer in layers]
    return outputs if residual_NO is None else [residual_NO + outputs[0]]


def linear(layer: AnyLayer, x_NH: torch.Tensor) -> torch.Tensor:
    """Run a linear layer, with LoRA if it has any: [N, O]. Variants such as DoRA run by PEFT's own forward.

    Without gradients on a CPU, what a row gives does not depend on how many rows there are: a product of one to three
    rows, which may be one thread's part, sums in another order than all others, so the rows are padded.
    """
    lacking = -len(x_NH) % ROWS if x_NH.device.type == "cpu" and not torch.is_grad_enabled() else 0
    return _linear(layer, F.pad(x_NH, (0, 0, 0, lacking)))[: len(x_NH)] if lacking else _linear(layer, x_NH)


def _linear(layer: AnyLayer, x_NH: torch.Tensor) -> torch.Tensor:
    tensors = layer if isinstance(layer, Layer) else layer_of(layer)
    if tensors is not None:
        return _plain(tensors, x_NH)
    module: Any = layer
    if module.merged or module.lora_variant:
        return module(x_NH)
    base = module.get_base_layer()
    y_NO = _plain(Layer(base.weight, base.bias), x_NH)
    for name in module.active_adapters:
        if name in module.lora_A:
            low_Nr = F.linear(module.lora_dropout[name](x_NH), module.lora_A[name].weight.to(x_NH.dtype))
            y_NO = y_NO + F.linear(low_Nr, module.lora_B[name].weight.to(x_NH.dtype)) * module.scaling[name]
    return y_NO


def _plain(layer: Layer, x_NH: torch.Tensor) -> torch.Tensor:
    bias_O = None if layer.bias_O is None else layer.bias_O.to(x_NH.dtype)
    y_NO = F.linear(x_NH, layer.weight_OH.to(x_NH.dtype), bias_O)
    if layer.a_rH is None or layer.b_Or is None:
        return y_NO
    return y_NO + F.linear(F.linear(x_NH, layer.a_rH.to(x_NH.dtype)), layer.b_Or.to(x_NH.dtype)) * layer.scaling


def normed(module: Any, x_NH: torch.Tensor) -> torch.Tensor:
    """Run a norm whose weight may be a float32 master, in the activations' dtype."""
    return module(x_NH).to(x_NH.dtype)
