"""The cost of a step, by arithmetic: floating-point operations, and the peaks of GPUs.

Model FLOPs count the operations that the result needs, no recomputation: 2 a weight and row in forward; 2 more for the
gradient of its input; 2 more for the weight's own gradient where it trains. Attention takes 4 H a pair of positions
in forward, half of the pairs being masked, and twice that in backward. MFU is model FLOPs a second over the peak of
the GPU (https://arxiv.org/abs/2204.02311, appendix B, with frozen weights left out of the weight gradients).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from higgs_tune.train.model.load import HiggsAudioModel
from torch import nn

# dense bfloat16 FLOP/s and bytes/s of device memory, from the vendor's data sheets
PEAKS: dict[str, tuple[float, float]] = {
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.0e12),
    "L40S": (362e12, 0.864e12),
    "RTX 4090": (165e12, 1.008e12),
}


@dataclass(frozen=True)
class Rows:
    """Rows of one or many packs: positions, those of text and of audio, sums of squared sample lengths, label rows."""

    positions: float
    text: float
    audio: float
    squares: float
    text_labels: float
    audio_labels: float

    @staticmethod
    def typical(length: int = 560, text_share: float = 0.3, labels: float = 0.075, audio_labels: float = 0.35) -> Rows:
        """One sample of the benchmarks' length distribution; the label shares are of all positions."""
        return Rows(length, length * text_share, length * (1 - text_share), length**2, length * labels,
                    length * audio_labels)  # fmt: skip


def peak_of(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by its name; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for known, (flops, _) in PEAKS.items() if known in name), None)


def model_flops(model: HiggsAudioModel, rows: Rows) -> float:
    """Model FLOPs of forward and backward over the rows."""
    total = 0.0
    layers: Any = model.layers
    for layer in layers:
        for name, count in (("self_attn", rows.positions), ("mlp", rows.text), ("audio_mlp", rows.audio),
                            ("audio_attn", rows.audio)):  # fmt: skip
            if hasattr(layer, name):
                total += count * _flops_a_row(getattr(layer, name))
        attention: Any = layer.self_attn
        total += 3 * 4 * attention.num_heads * attention.head_dim * rows.squares / 2
    heads = model.audio_decoder_proj
    total += rows.text_labels * _flops_a_row(heads.text_lm_head)
    return total + rows.audio_labels * _flops_a_row(heads.audio_lm_head)


def _flops_a_row(module: nn.Module) -> float:
    return sum((6 if p.requires_grad else 4) * p.numel() for p in module.parameters() if p.ndim == 2)
