"""What each kind of LoRA costs beside plain LoRA: time of the step, and memory that it keeps against the estimate.

    python bench/lora_kinds.py --size small [--pairs 5] [--out kinds.json]

One base model holds the adapters of every kind; a round runs forward and backward of each kind over the same pack, so
the ratio of a round compares steps that ran one after the other. Before the rounds each kind runs once by plain
operations too, under the same dropout masks: a relative difference of loss or gradient norm above 1e-3 in float32, or
2e-2 in bfloat16, ends the run with an error, after its results are written. Memory is what the decoder keeps. Without a
GPU the ratio of CPU time stands beside that of time: other programs on the same cores change it less.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from growth import LOSS, equal_pack, kept_bytes, pack_of
from higgs_tune.shards.memory import keep_memory
from higgs_tune.train.data.batch import Batch, collate
from higgs_tune.train.model.forward import ExecOptions, label_states
from higgs_tune.train.model.fused_linear import stack_layer
from higgs_tune.train.model.kernel_choice import KernelName, choose_kernels
from higgs_tune.train.model.loss import pack_loss
from higgs_tune.train.model.memory import activation_bytes, lora_matrix_bytes
from higgs_tune.train.presets import LORA_EXTRAS, PRESETS
from machine import describe_machine
from models.synthetic import IDS, SIZES, SizeName, config_of, make_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from train_step import agrees

PATTERN = PRESETS["comprehensive"].pattern
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}  # of loss and gradient norm
WITH_HEADS = "|".join([PATTERN, *map(re.escape, LORA_EXTRAS["heads"])])
# the options of each adapter that is active, beside those of plain LoRA
KINDS: dict[str, list[dict[str, Any]]] = {
    "LoRA": [{}],
    "dropout 0.1": [{"lora_dropout": 0.1}],
    "rsLoRA": [{"use_rslora": True}],
    "DoRA": [{"use_dora": True}],
    "DoRA, rsLoRA": [{"use_dora": True, "use_rslora": True}],
    "DoRA, dropout 0.1": [{"use_dora": True, "lora_dropout": 0.1}],
    "two adapters": [{}, {}],
    "heads too": [{"target_modules": WITH_HEADS}],
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
    kernels: KernelName | Literal["auto"] = "eager"
    """As the trainer's --kernels."""
    out: Path | None = None
    """JSON file of the results."""


def names_of(kind: str) -> list[str]:
    """Names of a kind's adapters."""
    return [f"kind{list(KINDS).index(kind)}_{number}" for number in range(len(KINDS[kind]))]


def adapted(options: Options, device: torch.device, dtype: torch.dtype) -> PeftModel:
    """A model with the adapters of every kind; its layers are stacked."""
    model = make_model(config_of(SIZES[options.size]), device, dtype)
    torch.manual_seed(0)
    common: dict[str, Any] = {"r": options.rank, "lora_alpha": 2 * options.rank, "target_modules": PATTERN}
    configs = {
        name: LoraConfig(**common | changes)
        for kind, adapters in KINDS.items()
        for name, changes in zip(names_of(kind), adapters, strict=True)
    }
    first, *others = configs
    peft_model = get_peft_model(model, configs[first], adapter_name=first)  # pyright: ignore
    assert isinstance(peft_model, PeftModel)
    for name in others:
        peft_model.add_adapter(name, configs[name])
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.01)
    for layer in model.layers:
        stack_layer(layer)
    return peft_model.train()


@dataclass(frozen=True)
class Step:
    """Forward and backward of one pack by the adapters that are active."""

    model: Any
    batch: Batch
    weights: torch.Tensor
    exec_options: ExecOptions

    def run(self, exec_options: ExecOptions) -> torch.Tensor:
        """Returns the loss; the gradients stay."""
        self.model.zero_grad(set_to_none=True)
        states = label_states(self.model, self.batch, exec_options)
        loss = pack_loss(self.model, states, self.batch, self.weights, LOSS, at_labels=True).total
        loss.backward()
        if loss.device.type == "cuda":
            torch.cuda.synchronize()
        return loss.detach()

    def compare(self) -> dict[str, float]:
        """Relative differences of loss and gradient norm from those of plain operations."""
        found = []
        for exec_options in (self.exec_options, ExecOptions(plain=True)):
            torch.manual_seed(0)  # of the dropout masks
            loss = self.run(exec_options)
            norms = [parameter.grad.norm() for parameter in self.model.parameters() if parameter.grad is not None]
            found.append((float(loss), float(torch.stack(norms).norm())))
        (loss, norm), (plain_loss, plain_norm) = found
        return {"loss": abs(loss / plain_loss - 1), "grad_norm": abs(norm / plain_norm - 1)}

    def memory(self) -> tuple[float, float]:
        """Bytes that the decoder keeps for a position, and the estimate."""
        text_share = 1 - self.batch["codes_KA"].shape[1] / self.batch.positions
        kept = kept_bytes(self.model, self.batch, self.exec_options) / self.batch.positions
        compiled = self.exec_options.kernels == "compiled"
        estimate = activation_bytes(self.model, compiled=compiled, text_share=text_share, label_share=0.0)
        return kept, estimate + lora_matrix_bytes(self.model) / self.batch.positions


def main() -> None:
    options = tyro.cli(Options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_memory()
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    peft_model = adapted(options, device, getattr(torch, dtype))
    # the stated distribution has no sample that fits into the smallest packs
    samples = pack_of(options.positions) or equal_pack(options.positions, options.positions)
    batch = collate(samples, 0.0, IDS).to(device)
    weights = LOSS.per_label(torch.cat([batch["label_counts"], batch["pairs"]]).float())
    step = Step(peft_model.get_base_model(), batch, weights, ExecOptions(choose_kernels(options.kernels, device)))
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    cpu_seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    memory: dict[str, tuple[float, float]] = {}
    apart: dict[str, dict[str, float]] = {}
    for number in range(options.pairs + 1):
        for kind in KINDS:
            peft_model.base_model.set_adapter(names_of(kind))  # pyright: ignore[reportCallIssue]
            if not number:  # this sets things up, too
                apart[kind] = step.compare()
                memory[kind] = step.memory()
                print(f"{kind} is ready", flush=True)
                continue
            began, cpu_began = time.perf_counter(), time.process_time()
            step.run(step.exec_options)
            seconds[kind].append(time.perf_counter() - began)
            cpu_seconds[kind].append(time.process_time() - cpu_began)
    print(describe_machine())
    print(f"{options.size}, {batch.positions} positions, rank {options.rank}; {options.pairs} pairs")
    largest = max(value for of_kind in apart.values() for value in of_kind.values())
    print(f"loss and gradient norm differ from those of plain operations by {largest:.0e} at most (relative)")
    result = show(seconds, cpu_seconds, memory)
    for kind, values in result.items():
        values["relative_differences"] = apart[kind]
    if options.out:
        options.out.write_text(json.dumps({"options": vars(options), "kinds": result}, indent=1, default=str) + "\n")
    tolerance = TOLERANCES[dtype]
    for kind, differences in apart.items():
        if not agrees(differences, dict.fromkeys(differences, tolerance)):
            raise SystemExit(f"{kind} differs from plain operations by more than {tolerance:g}: {differences}")


def show(
    seconds: dict[str, list[float]], cpu_seconds: dict[str, list[float]], memory: dict[str, tuple[float, float]]
) -> dict[str, dict[str, Any]]:
    """Print the table; returns its values by kind."""
    heads = {"s a step": 10, "ratio": 8, "spread": 16, "of CPU time": 22, "kept B/position": 17, "estimate": 10}
    print(" " * 20 + "".join(f"{head:>{width}}" for head, width in heads.items()))
    result: dict[str, dict[str, Any]] = {}
    for kind, values in seconds.items():
        ratios, of_cpu = ([a / b for a, b in zip(of[kind], of["LoRA"], strict=True)] for of in (seconds, cpu_seconds))
        spread, (kept, estimate) = f"{min(ratios):.2f} to {max(ratios):.2f}", memory[kind]
        result[kind] = {"seconds": values, "cpu_seconds": cpu_seconds[kind], "ratios": ratios, "cpu_ratios": of_cpu,
                        "kept": kept, "estimate": estimate}  # fmt: skip
        cpu = f"{statistics.median(of_cpu):.2f}x {min(of_cpu):.2f} to {max(of_cpu):.2f}"
        print(f"{kind:<20}{statistics.median(values):>10.2f}{statistics.median(ratios):>7.2f}x{spread:>16}{cpu:>22}"
              f"{kept:>17,.0f}{estimate:>10,.0f}")  # fmt: skip
    return result


if __name__ == "__main__":
    main()
