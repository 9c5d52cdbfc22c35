"""Linear layers with PEFT's LoRA, by plain operations, in the dtype of the activations.

What trains is kept in float32 and used in the activations' dtype. `fused_linear.py` computes the same faster.

Shapes: N rows, H input width, O output width, r rank of LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from higgs_tune.train.model.dropout import drop, new_seed
from higgs_tune.train.model.layer_input import Source
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn


class Layer(NamedTuple):
    """The tensors of a linear layer with LoRA; `lora_math.py` says what they compute.

    magnitude_O: DoRA's. dropout: the share of its input that LoRA drops; 0 while evaluating.
    """

    weight_OH: torch.Tensor
    bias_O: torch.Tensor | None = None
    a_rH: torch.Tensor | None = None
    b_Or: torch.Tensor | None = None
    magnitude_O: torch.Tensor | None = None
    scaling: float = 0.0
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        """0 without LoRA."""
        return 0 if self.a_rH is None else len(self.a_rH)


AnyLayer = Layer | nn.Module
ROWS = 8  # a multiple of this is multiplied at once


def layer_of(module: nn.Module) -> Layer | None:
    """The tensors of a linear layer; None where PEFT computes more than a `Layer` says.

    That is so with merged adapters, several adapters that differ in dropout or of which one is DoRA, and with other
    variants of LoRA. The trainer makes none of them.
    """
    if not isinstance(module, LoraLayer):
        plain: Any = module  # a linear layer, or peft's wrapper of one that is trained in full
        return Layer(plain.weight, plain.bias)
    base: Any = module.get_base_layer()
    names = [name for name in module.active_adapters if name in module.lora_A]
    if module.merged:
        return None
    if module.disable_adapters or not names:
        return Layer(base.weight, base.bias)
    return _with_lora(module, names)


def _with_lora(module: LoraLayer, names: list[str]) -> Layer | None:
    """`layer_of` a layer with these adapters; several become one of all their ranks."""
    base: Any = module.get_base_layer()
    shares = {_dropout_share(module.lora_dropout[name]) for name in names}
    variants: list[Any] = [module.lora_variant[name] for name in names if name in module.lora_variant]
    known = all(isinstance(variant, DoraLinearVariant) for variant in variants)
    if not known or len(shares) > 1 or (variants and len(names) > 1):
        return None
    a: list[torch.Tensor] = [module.lora_A[name].get_parameter("weight") for name in names]
    b: list[torch.Tensor] = [module.lora_B[name].get_parameter("weight") for name in names]
    if len(names) > 1:
        scaled = [b_Or * module.scaling[name] for b_Or, name in zip(b, names, strict=True)]
        return Layer(base.weight, base.bias, torch.cat(a), torch.cat(scaled, 1), None, 1.0, *shares)
    magnitudes: Any = module.lora_magnitude_vector if variants else {}
    magnitude_O = magnitudes[names[0]].weight if variants else None
    return Layer(base.weight, base.bias, a[0], b[0], magnitude_O, module.scaling[names[0]], *shares)


def _dropout_share(dropout: Any) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def layers_of(*modules: nn.Module) -> tuple[AnyLayer, ...]:
    """The tensors of linear layers; a module that `layer_of` cannot tell stays a module."""
    return tuple(layer_of(module) or module for module in modules)


def plain_project(
    source: Source, layers: Sequence[AnyLayer], residual_NO: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Run linear layers on the source by plain operations: a list of [N, O].

    Args:
        layers: from `layers_of`.
        residual_NO: added to the output of a single layer.
    """
    x_NH, seed = source.forward(), new_seed() if any_dropout(layers) else 0
    outputs = [linear(layer, x_NH, seed) for layer in layers]
    return outputs if residual_NO is None else [residual_NO + outputs[0]]


def may_compile(layers: Sequence[AnyLayer]) -> bool:
    """Whether `--kernels compiled` compiles them: with dropout or DoRA, compiled code would keep masks and copies."""
    return not any(isinstance(layer, Layer) and (layer.dropout or layer.magnitude_O is not None) for layer in layers)


def any_dropout(layers: Sequence[AnyLayer]) -> bool:
    """Whether LoRA drops a share of these layers' input."""
    return any(isinstance(layer, Layer) and layer.dropout for layer in layers)


def linear(layer: AnyLayer, x_NH: torch.Tensor, seed: int | None = None) -> torch.Tensor:
    """Run a linear layer, with LoRA if it has any: [N, O]. What is no `Layer` runs by PEFT's own forward.

    Without gradients on a CPU, what a row gives does not depend on how many rows there are: a product of one to three
    rows, which may be one thread's part, sums in another order than all others, so the rows are padded.

    Args:
        seed: of the dropout mask; by default a new one.
    """
    lacking = -len(x_NH) % ROWS if x_NH.device.type == "cpu" and not torch.is_grad_enabled() else 0
    if not lacking:
        return _linear(layer, x_NH, seed)
    return _linear(layer, F.pad(x_NH, (0, 0, 0, lacking)), seed)[: len(x_NH)]


def _linear(layer: AnyLayer, x_NH: torch.Tensor, seed: int | None) -> torch.Tensor:
    tensors = layer if isinstance(layer, Layer) else layer_of(layer)
    if tensors is not None:
        return _plain(tensors, x_NH, seed)
    module: Any = layer
    return module(x_NH)


def _plain(layer: Layer, x_NH: torch.Tensor, seed: int | None) -> torch.Tensor:
    weight_OH, bias = layer.weight_OH.to(x_NH.dtype), 0.0 if layer.bias_O is None else layer.bias_O.to(x_NH.dtype)
    y_NO = F.linear(x_NH, weight_OH)
    if layer.a_rH is None or layer.b_Or is None:
        return y_NO if layer.bias_O is None else y_NO + bias
    read_NH = x_NH
    if layer.dropout:
        read_NH = drop(x_NH, layer.dropout, new_seed() if seed is None else seed) / (1 - layer.dropout)
    low_NO = F.linear(F.linear(read_NH, layer.a_rH.to(x_NH.dtype)), layer.b_Or.to(x_NH.dtype)) * layer.scaling
    if layer.magnitude_O is not None:
        whole_OH = layer.weight_OH.detach() + layer.scaling * (layer.b_Or.detach() @ layer.a_rH.detach())
        scale_O = (layer.magnitude_O / torch.linalg.vector_norm(whole_OH, dim=1)).to(x_NH.dtype)
        read_NO = F.linear(read_NH, weight_OH) if layer.dropout else y_NO
        y_NO = y_NO + (scale_O - 1) * read_NO
        low_NO = scale_O * low_NO
    return y_NO + low_NO if layer.bias_O is None else y_NO + bias + low_NO


def normed(module: Any, x_NH: torch.Tensor) -> torch.Tensor:
    """Run a norm whose weight may be a float32 master, in the activations' dtype."""
    return module(x_NH).to(x_NH.dtype)
