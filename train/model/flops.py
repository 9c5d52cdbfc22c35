"""The cost of a step, by arithmetic: floating-point operations.

Model FLOPs count the operations that the result needs, no recomputation: 2 a weight and row in forward; 2 more for the
gradient of its input; 2 more for the weight's own gradient where it trains. DoRA with dropout takes a frozen weight
twice, for its input with and without dropout, and so do their gradients. Attention takes 4 H a pair of positions
in forward, half of the pairs being masked, and twice that in backward. A Whisper tower runs over whole windows of 30 s,
without a mask, and has no backward where it is frozen. MFU is model FLOPs a second over the peak of
the GPU (`gpus.py`; https://arxiv.org/abs/2204.02311, appendix B, with frozen weights left out of the weight gradients).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from higgs_tune.shards.sequence import MEL_WINDOW
from higgs_tune.train.model.forward import Checkpointing
from higgs_tune.train.model.gpus import Gpu, gpu_of_device
from higgs_tune.train.model.linear import layer_of
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.quantized import QuantizedWeight, stored_bytes
from peft.tuners.lora import LoraLayer
from torch import nn

# `estimated_seconds`
PRODUCT_SHARE, TRAFFIC_SHARE = 0.7, 0.75
PASSES_HIDDEN, PASSES_FFN = 228, 10


@dataclass(frozen=True)
class Rows:
    """Rows of one or many packs: positions, those of text and of audio, sums of squared sample lengths, label rows.

    windows: of 30 s that the Whisper tower takes.
    """

    positions: float
    text: float
    audio: float
    squares: float
    text_labels: float
    audio_labels: float
    windows: float = 0.0

    @staticmethod
    def typical(length: int = 560, text_share: float = 0.3, labels: float = 0.075, audio_labels: float = 0.35) -> Rows:
        """One sample of the benchmarks' length distribution; the label shares are of all positions."""
        return Rows(length, length * text_share, length * (1 - text_share), length**2, length * labels,
                    length * audio_labels)  # fmt: skip

    def __mul__(self, factor: float) -> Rows:
        return Rows(*(factor * getattr(self, item.name) for item in fields(self)))


def peak_of(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by its name; None where it is not known."""
    if device.type != "cuda":
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name(device))
    return gpu.flops if gpu else None


def model_flops(model: HiggsAudioModel, rows: Rows) -> float:
    """Model FLOPs of forward and backward over the rows."""
    total = 0.0
    layers: Any = model.layers
    for layer in layers:
        total += sum(count * _flops_a_row(module) for module, count in _parts_of(layer, rows))
        attention: Any = layer.self_attn
        total += 3 * 4 * attention.num_heads * attention.head_dim * rows.squares / 2
    heads = model.audio_decoder_proj
    total += rows.text_labels * _flops_a_row(heads.text_lm_head) + rows.audio_labels * _flops_a_row(heads.audio_lm_head)
    return total + (rows.windows * _tower_flops(model.audio_tower) if rows.windows else 0.0)


def _tower_flops(tower: Any) -> float:
    """FLOPs of the Whisper tower over a window."""
    rows, width = MEL_WINDOW // 2, tower.conv1.out_channels
    products = 2 * tower.conv1.weight.numel() + tower.conv2.weight.numel()  # the first one runs on twice the rows
    products += sum(p.numel() for p in tower.layers.parameters() if p.ndim == 2)
    trains = any(parameter.requires_grad for parameter in tower.parameters())
    return (3 if trains else 1) * (2 * rows * products + len(tower.layers) * 4 * width * rows**2)


def recomputed_flops(model: HiggsAudioModel, rows: Rows, checkpointing: Checkpointing) -> float:
    """FLOPs of the layers' forward that backward runs again: of every layer, or of the FFNs alone."""
    total = 0.0
    layers: Any = model.layers
    for layer in layers if checkpointing != "none" else ():
        ffns = (getattr(layer, "mlp", None), getattr(layer, "audio_mlp", None))
        for module, count in _parts_of(layer, rows):
            if checkpointing == "full" or module in ffns:
                total += 2 * count * sum(p.numel() * times for p, times in _products(module))
        if checkpointing == "full":
            total += 4 * layer.self_attn.num_heads * layer.self_attn.head_dim * rows.squares / 2
    return total


def estimated_seconds(model: HiggsAudioModel, rows: Rows, gpu: Gpu, checkpointing: Checkpointing) -> float:
    """Seconds of forward and backward over a pack, by arithmetic: nobody has measured it.

    Products run at `PRODUCT_SHARE` of the GPU's peak; what is no product moves memory at `TRAFFIC_SHARE` of its
    bandwidth: bfloat16 values a position and layer, `PASSES_HIDDEN` times the hidden size and `PASSES_FFN` times the
    FFN's, and all weights two or three times. Both shares are what kernels of these sizes commonly reach; the passes
    were counted in a trace of the released sizes. A Whisper tower counts by its products.
    """
    layers: Any = model.layers
    text: Any = model.config.text_config
    values = rows.positions * (PASSES_HIDDEN * text.hidden_size + PASSES_FFN * text.intermediate_size) * len(layers)
    again = 1.25 if checkpointing == "full" else 1.0  # of the passes, a quarter are forward's
    weights = sum(_weight_traffic(p) for layer in layers for p in layer.parameters())
    traffic = 2 * values * again + weights * (3 if checkpointing == "full" else 2)
    products = model_flops(model, rows) + recomputed_flops(model, rows, checkpointing)
    return products / (PRODUCT_SHARE * gpu.flops) + traffic / (TRAFFIC_SHARE * gpu.bytes_per_second)


def _weight_traffic(parameter: torch.Tensor) -> int:
    """Bytes that move where a product reads a weight; a quantized one is also written and read whole."""
    is_quantized = isinstance(parameter, QuantizedWeight)
    return stored_bytes(parameter) + (2 * parameter.numel() * parameter.itemsize if is_quantized else 0)


def _parts_of(layer: Any, rows: Rows) -> list[tuple[nn.Module, float]]:
    """The parts of a layer that hold linear layers, and the rows that each runs over."""
    counts = {"self_attn": rows.positions, "mlp": rows.text, "audio_mlp": rows.audio, "audio_attn": rows.audio}
    return [(getattr(layer, name), count) for name, count in counts.items() if hasattr(layer, name)]


def _flops_a_row(module: nn.Module) -> float:
    return sum((6 if p.requires_grad else 4 * times) * p.numel() for p, times in _products(module))


def _products(module: nn.Module) -> list[tuple[torch.Tensor, int]]:
    """Each matrix of the module, and how often forward multiplies rows by it: twice by those of DoRA with dropout."""
    layers = [layer_of(part) for part in module.modules() if isinstance(part, LoraLayer)]
    twice = {id(layer.weight_OH) for layer in layers if layer and layer.magnitude_O is not None and layer.dropout}
    return [(p, 2 if id(p) in twice else 1) for p in module.parameters() if p.ndim == 2]
