"""Peak host memory and time of higgs-export at the released size, against copying the files.

    python export.py [--size released|small] [--work FOLDER]

Makes a random checkpoint in Boson's layout, file by file (the released size needs 12 GB of disk, and 12 GB more for a
result), and an adapter of rank 16 on all linear layers of the decoder. Then, each in a process of its own: a copy of
the files, fsynced, and an export in each layout. Results are removed one by one, the checkpoint at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from higgs_tune.preprocess.checkpoints.weights import INDEX
from higgs_tune.shards import durable
from higgs_tune.train.export.folder import write_weights
from higgs_tune.train.export.tensors import Shape
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.lora import TrainableOptions, target_modules
from higgs_tune.train.model.module_names import exact_pattern
from higgs_tune.train.toy import make_tokenizer, model_config, texts_of
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
RELEASED = {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
            "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
SMALL = RELEASED | {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
BLOCK = 2**24


@dataclass(frozen=True)
class Tiled:
    """A tensor made of one random block, again and again; bfloat16."""

    shape: Shape
    block: torch.Tensor
    dtype: torch.dtype = torch.bfloat16

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of it."""
        count = (stop - start) * math.prod(self.shape[1:])
        values = self.block[:count] if count <= BLOCK else self.block.repeat(-(-count // BLOCK))[:count]
        return values.reshape(stop - start, *self.shape[1:])


def make_checkpoint(folder: Path, sizes: dict[str, int]) -> None:
    """A random checkpoint `folder/model` and its adapter `folder/adapter`."""
    tokenizer = make_tokenizer(texts_of(ROOT / "examples" / "arabic" / "chatml.json"))
    layers, hidden, inner = (sizes[n] for n in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    audio = {"audio_ffn_hidden_size": hidden, "audio_ffn_intermediate_size": inner}
    config = model_config(tokenizer, audio_dual_ffn_layers=list(range(layers)), torch_dtype="bfloat16", **audio)
    for name, value in sizes.items():
        setattr(config.text_config, name, value)
    with torch.device("meta"):
        model = HiggsAudioModel(config)
    torch.manual_seed(0)
    block = (torch.randn(BLOCK) * 0.02).bfloat16()
    model_folder, adapter = folder / "model", folder / "adapter"
    model_folder.mkdir(parents=True)
    tokenizer.save_pretrained(model_folder)
    durable.write_bytes(model_folder / "config.json", config.to_json_string().encode())
    weights = {name: Tiled(tuple(value.shape), block) for name, value in model.state_dict().items()}
    write_weights(model_folder, weights)
    if not (model_folder / INDEX).exists() and sizes is RELEASED:
        raise RuntimeError("the released size should need several files")
    targets, tensors = target_modules(model, TrainableOptions(), "single"), {}
    for name in targets:
        out, width = model.get_submodule(name).weight.shape  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(16, int(width)) * 0.02
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(int(out), 16) * 0.02
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": exact_pattern(targets)}
    (adapter / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": "../model"}))


def copy(source: Path, target: Path) -> None:
    """Copy the files of a folder, fsynced."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        durable.fsync_file(target / file.name)


def measured(command: list[str | Path]) -> tuple[float, float]:
    """Seconds, and peak resident memory in GB, of a command."""
    started = time.monotonic()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"failed: {command}")
    return time.monotonic() - started, usage.ru_maxrss / 1e6


def runs(work: Path) -> Iterator[tuple[str, list[str | Path]]]:
    """What is measured: a name and a command that writes `work/result`."""
    python, export = Path(sys.executable), ["-m", "higgs_tune.train.export.merge"]
    yield "copy", [python, Path(__file__).resolve(), "--copy", work / "model", work / "result"]
    for layout in ("original", "native"):
        told = ["--out", work / "result", "--layout", layout]
        yield f"{layout}, merged", [python, *export, work / "adapter", *told]
    yield "native, converted", [python, *export, work / "model", "--out", work / "result", "--layout", "native"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("released", "small"), default="released")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench_export")
    parser.add_argument("--copy", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.copy:
        copy(*options.copy)
        return
    work: Path = options.work
    shutil.rmtree(work, ignore_errors=True)
    try:
        make_checkpoint(work, RELEASED if options.size == "released" else SMALL)
        size = sum(file.stat().st_size for file in (work / "model").iterdir()) / 1e9
        made = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"checkpoint of {size:.2f} GB, made with {made:.2f} GB of memory", flush=True)
        base = 0.0
        for name, command in runs(work):
            seconds, memory = measured(command)
            base = base or seconds
            print(f"{name:<18} {seconds:7.1f} s  {seconds / base:5.2f} x copy  {memory:5.2f} GB", flush=True)
            shutil.rmtree(work / "result")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
