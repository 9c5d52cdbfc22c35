"""What each kind of LoRA costs beside plain LoRA: time of the step, and memory that it keeps against the estimate.

    python bench/lora_kinds.py --size small [--pairs 5] [--out kinds.json]

One base model holds an adapter of every kind; a round runs forward and backward of each over the same pack, so the
ratio of a round compares steps that ran one after the other. Without a GPU the ratio of CPU time stands beside it:
other programs on the same cores change it less.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from growth import LOSS, kept_bytes, pack_of
from higgs_tune.shards.memory import keep_memory
from higgs_tune.train.data.batch import collate
from higgs_tune.train.model.forward import ExecOptions, label_states
from higgs_tune.train.model.fused_linear import stack_layer
from higgs_tune.train.model.loss import pack_loss
from higgs_tune.train.model.memory import activation_bytes
from higgs_tune.train.presets import PRESETS
from machine import describe_machine
from models.synthetic import IDS, SIZES, SizeName, config_of, make_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "dropout 0.1": {"lora_dropout": 0.1},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "DoRA, dropout 0.1": {"use_dora": True, "lora_dropout": 0.1},
}


@dataclass(frozen=True)
class Options:
    """Kinds of LoRA."""

    size: SizeName = "small"
    """Size of the model."""
    positions: int = 4096
    """Positions of the pack."""
    pairs: int = 5
    """Rounds; each runs every kind once."""
    rank: int = 16
    """Rank of LoRA."""
    out: Path | None = None
    """JSON file of the results."""


def adapted(options: Options, device: torch.device, dtype: torch.dtype) -> PeftModel:
    """A model with an adapter of every kind, by the names of `KINDS`; its layers are stacked."""
    model = make_model(config_of(SIZES[options.size]), device, dtype)
    torch.manual_seed(0)
    common: dict[str, Any] = {"r": options.rank, "lora_alpha": 2 * options.rank}
    common["target_modules"] = PRESETS["comprehensive"].pattern
    names = dict(zip(KINDS, "abcde", strict=True))
    peft_model = get_peft_model(model, LoraConfig(**common), adapter_name=names["LoRA"])  # pyright: ignore
    assert isinstance(peft_model, PeftModel)
    for kind, changes in list(KINDS.items())[1:]:
        peft_model.add_adapter(names[kind], LoraConfig(**common, **changes))
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.01)
    for layer in model.layers:
        stack_layer(layer)
    return peft_model.train()


def main() -> None:
    options = tyro.cli(Options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_memory()
    peft_model = adapted(options, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    model: Any = peft_model.get_base_model()
    batch = collate(pack_of(options.positions), 0.0, IDS).to(device)
    weights = LOSS.per_label(torch.cat([batch["label_counts"], batch["pairs"]]).float())
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    cpu_seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    memory: dict[str, tuple[float, float]] = {}
    for number in range(options.pairs + 1):
        for kind, name in zip(KINDS, "abcde", strict=True):
            peft_model.set_adapter(name)
            model.zero_grad(set_to_none=True)
            began, cpu_began = time.perf_counter(), time.process_time()
            pack_loss(model, label_states(model, batch), batch, weights, LOSS, at_labels=True).total.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round sets things up
                seconds[kind].append(time.perf_counter() - began)
                cpu_seconds[kind].append(time.process_time() - cpu_began)
            else:
                text_share = 1 - batch["codes_KA"].shape[1] / batch.positions
                kept = kept_bytes(model, batch, ExecOptions()) / batch.positions
                memory[kind] = (kept, activation_bytes(model, text_share=text_share))
    print(describe_machine())
    print(f"{options.size}, {batch.positions} positions, rank {options.rank}; {options.pairs} pairs")
    heads = {"s a step": 10, "ratio": 8, "spread": 16, "of CPU time": 22, "kept B/position": 17, "estimate": 10}
    print(" " * 20 + "".join(f"{head:>{width}}" for head, width in heads.items()))
    result: dict[str, Any] = {}
    for kind, values in seconds.items():
        ratios, of_cpu = ([a / b for a, b in zip(of[kind], of["LoRA"], strict=True)] for of in (seconds, cpu_seconds))
        spread, (kept, estimate) = f"{min(ratios):.2f} to {max(ratios):.2f}", memory[kind]
        result[kind] = {"seconds": values, "cpu_seconds": cpu_seconds[kind], "ratios": ratios, "cpu_ratios": of_cpu,
                        "kept": kept, "estimate": estimate}  # fmt: skip
        cpu = f"{statistics.median(of_cpu):.2f}x {min(of_cpu):.2f} to {max(of_cpu):.2f}"
        print(f"{kind:<20}{statistics.median(values):>10.2f}{statistics.median(ratios):>7.2f}x{spread:>16}{cpu:>22}"
              f"{kept:>17,.0f}{estimate:>10,.0f}")  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps({"options": vars(options), "kinds": result}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
