"""What a step must cost: FLOPs and bytes a token of a config, the floor on a named GPU, and the measured share of it.

    cd bench && python -m models.roofline [--size 3b] [--gpu H200] [--tokens_per_pack 16384] [--measured 40000]

Arithmetic only (`train/model/flops.py`), on the data sheet's peaks. Bytes are the fewest: each weight read once in
forward and once in backward, each kept activation written and read once. The larger of both times is the floor. MFU
is model FLOPs a second over the peak; nothing that is computed again counts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from higgs_tune.train.model.flops import Rows, model_flops
from higgs_tune.train.model.gpus import gpu_named
from higgs_tune.train.model.load import HiggsAudioModel, load_config
from higgs_tune.train.model.memory import activation_bytes
from models.synthetic import SIZES, SizeName, config_of, parameter_count, with_lora


@dataclass(frozen=True)
class Options:
    """Roofline of the training step."""

    size: SizeName = "3b"
    """Size of the model."""
    model_path: Path | None = None
    """A checkpoint folder whose config is taken in place of a size."""
    gpu: str = "H200"
    """Name of the GPU, as in train/model/gpus.py."""
    tokens_per_pack: int = 16_384
    """Positions of a pack."""
    sample_length: int = 560
    """Positions of a sample."""
    rank: int = 16
    """Rank of LoRA."""
    measured: float | None = None
    """Useful tokens/s that were measured, for MFU."""
    out: Path | None = None
    """JSON file of the results."""


def roofline(options: Options) -> dict[str, Any]:
    config = load_config(options.model_path) if options.model_path else config_of(SIZES[options.size])
    with torch.device("meta"):
        model = HiggsAudioModel(config)
    model.requires_grad_(False)
    torch.nn.Module.to(model, dtype=torch.bfloat16)
    weight_bytes = 2 * parameter_count(model)
    with torch.device("meta"):
        with_lora(model, options.rank)
    rows = Rows.typical(options.sample_length)
    flops = model_flops(model, rows) / rows.positions
    traffic = 2 * weight_bytes / options.tokens_per_pack + 2 * activation_bytes(model)
    gpu = gpu_named(options.gpu)
    floor_s = max(flops / gpu.flops, traffic / gpu.bytes_per_second)
    found = {
        "gpu": gpu.name, "gflop_per_token": flops / 1e9, "kilobytes_per_token": traffic / 1e3,
        "activation_bytes_per_token_and_layer": activation_bytes(model) / len(model.layers),
        "flop_per_byte": flops / traffic, "bound": "arithmetic" if flops / gpu.flops >= floor_s else "memory",
        "most_tokens_per_second": 1 / floor_s,
    }  # fmt: skip
    if options.measured:
        found |= {"tokens_per_second": options.measured, "mfu": options.measured * flops / gpu.flops}
    return found


def main() -> None:
    options = tyro.cli(Options)
    found = roofline(options)
    for name, value in found.items():
        print(f"{name:<40}{value:>16,.3f}" if isinstance(value, float) else f"{name:<40}{value:>16}")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
