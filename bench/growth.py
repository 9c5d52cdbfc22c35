"""How cost grows: useful tokens/s and memory of forward and backward against pack size, and against sample length.

    python bench/growth.py --size small [--packs 2048 4096 8192] [--lengths 128 512 2048] [--kernels triton]

Pack sizes use the stated length distribution; sample lengths use packs of equal samples, three tenths of them text.
Memory: the peak beyond the weights; and what autograd keeps for each position and layer, beside the estimate of
`train/model/flops.py`.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from higgs_tune.shards.format import Arrays
from higgs_tune.shards.memory import keep_memory
from higgs_tune.train.data.batch import Batch, collate
from higgs_tune.train.metrics import PeakMemory
from higgs_tune.train.model.forward import Checkpointing, ExecOptions, hidden_states, label_states
from higgs_tune.train.model.fused_linear import stack_layer
from higgs_tune.train.model.kernel_choice import choose_kernels
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.loss import LossOptions, pack_loss
from higgs_tune.train.model.memory import activation_bytes, lora_matrix_bytes
from machine import describe_machine
from models.synthetic import IDS, SIZES, SizeName, config_of, make_model, position_count, synthetic_sample, with_lora

LOSS = LossOptions()
SEGMENT_EXTRA = 8  # positions of a segment beyond its frames and its placeholder


@dataclass(frozen=True)
class Options:
    """Growth benchmark."""

    size: SizeName = "small"
    """Size of the model."""
    packs: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    """Positions of a pack."""
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """Positions of a sample; at most a pack."""
    length_pack: int = 8192
    """Positions of a pack while sample lengths vary."""
    repeats: int = 3
    """Steps timed of each; the median counts."""
    kernels: Literal["auto", "eager", "compiled", "triton"] = "auto"
    """As the trainer's --kernels."""
    checkpointing: Checkpointing = "none"
    """Activation checkpointing."""
    out: Path | None = None
    """JSON file of the results."""


def exec_options_of(options: Options, device: torch.device) -> ExecOptions:
    return ExecOptions(choose_kernels(options.kernels, device), options.checkpointing)


def pack_of(positions: int) -> list[Arrays]:
    """Samples of the stated distribution, as many as fit."""
    found: list[Arrays] = []
    room = positions
    while True:
        sample = synthetic_sample(len(found))
        room -= position_count(sample)
        if room < 0:
            return found
        found.append(sample)


def equal_pack(positions: int, length: int) -> list[Arrays]:
    text = max(60, 3 * length // 10)
    frames = max(2, (length - text - 2 * SEGMENT_EXTRA) // 2)
    return [synthetic_sample(number, frames=(frames, frames), text=text) for number in range(positions // length)]


def kept_bytes(model: HiggsAudioModel, batch: Batch, exec_options: ExecOptions) -> int:
    """Bytes that autograd keeps for backward, but for parameters and the batch itself."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), batch.flat)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states(model, batch, exec_options)
    return sum(storage.nbytes() for storage in kept.values())


def measure(model: HiggsAudioModel, samples: list[Arrays], options: Options) -> dict[str, Any]:
    device = next(model.parameters()).device
    batch: Batch = collate(samples, 0.0, IDS).to(device)
    counts = torch.cat([batch["label_counts"], batch["pairs"]])
    weights, exec_options = LOSS.per_label(counts.float()), exec_options_of(options, device)

    def step() -> float:
        """Forward and backward; returns seconds."""
        model.zero_grad(set_to_none=True)
        began = time.perf_counter()
        pack_loss(
            model, label_states(model, batch, exec_options), batch, weights, LOSS, at_labels=True
        ).total.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    step()  # sets things up
    with PeakMemory(device) as memory:
        step()
    seconds = [step() for _ in range(options.repeats)]
    kept = kept_bytes(model, batch, exec_options)
    time_s, layers = statistics.median(seconds), len(model.layers)
    estimate = activation_bytes(
        model, options.checkpointing, compiled=exec_options.kernels == "compiled", label_share=0.0
    )
    estimate += lora_matrix_bytes(model, options.checkpointing) / batch.positions
    return {
        "positions": batch.positions, "samples": len(samples), "seconds": seconds,
        "tokens_per_second": batch.positions / time_s, "peak_memory_gb": memory.more_gb,
        "kept_bytes_per_position_and_layer": kept / batch.positions / layers,
        "estimated_bytes_per_position_and_layer": estimate / layers,
    }  # fmt: skip


def main() -> None:
    options = tyro.cli(Options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cpu":
        keep_memory()
    model = make_model(config_of(SIZES[options.size]), device, dtype)
    with_lora(model)
    for layer in model.layers:
        stack_layer(layer)
    machine = describe_machine()
    print(machine)
    kernels = exec_options_of(options, device).kernels
    print(f"{options.size}, {dtype}, kernels {kernels}, checkpointing {options.checkpointing}")
    print(f"{'':<22}{'samples':>8}{'tokens/s':>11}{'peak GB':>9}{'kept B/pos/layer':>18}{'estimate':>10}")
    result: dict[str, Any] = {"size": options.size, "kernels": kernels, "machine": machine, "packs": {}, "lengths": {}}
    cases = [("packs", size, pack_of(size)) for size in options.packs]
    cases += [("lengths", length, equal_pack(options.length_pack, length)) for length in options.lengths]
    for kind, size, samples in cases:
        try:
            found = result[kind][size] = measure(model, samples, options)
        except torch.OutOfMemoryError as error:
            result[kind][size] = {"failed": str(error).splitlines()[0]}
            print(f"{kind.removesuffix('s'):<10}{size:>12,}  out of memory")
            continue
        print(f"{kind.removesuffix('s'):<10}{size:>12,}{found['samples']:>8}{found['tokens_per_second']:>11,.0f}"
              f"{found['peak_memory_gb']:>9.2f}{found['kept_bytes_per_position_and_layer']:>18,.0f}"
              f"{found['estimated_bytes_per_position_and_layer']:>10,.0f}")  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
