"""Peak host memory and time of higgs-export at the released size, against copying the files.

    python export.py [--size released|small] [--rounds 2] [--kinds lora dora converted] [--work FOLDER]

Makes a random checkpoint in Boson's layout, file by file (the released size needs 14 GB of disk, and 12 GB more for a
result), and two adapters of rank 16 on all linear layers of the decoder: LoRA, and DoRA with heads and audio embeddings
in full. Then, in turns, each in a process of its own: a copy of the files, fsynced, and an export. Results are removed
one by one; the last export starts from the native checkpoint that the one before it made.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from higgs_tune.preprocess.checkpoints.weights import INDEX
from higgs_tune.shards import durable
from higgs_tune.train.export.folder import write_weights
from higgs_tune.train.export.tensors import Held, Shape, Source, write_tensors
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.lora import TrainableOptions, target_modules
from higgs_tune.train.model.module_names import exact_pattern
from higgs_tune.train.toy import make_tokenizer, model_config, texts_of

ROOT = Path(__file__).parents[1]
RELEASED = {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
            "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
SMALL = RELEASED | {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
BLOCK = 2**24
KINDS = ("lora", "dora", "converted")
IN_FULL = ("audio_decoder_proj.text_lm_head", "audio_decoder_proj.audio_lm_head", "audio_codebook_embeddings")
# nothing but the copy is timed: no import of ours
COPY = """
import os, shutil, sys
source, target = sys.argv[1:]
os.mkdir(target)
for name in sorted(os.listdir(source)):
    shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
    with open(os.path.join(target, name), "rb") as file:
        os.fsync(file.fileno())
"""


@dataclass(frozen=True)
class Tiled:
    """A tensor made of one random block, again and again."""

    shape: Shape
    block: torch.Tensor
    dtype: torch.dtype = torch.bfloat16

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of it."""
        count = (stop - start) * math.prod(self.shape[1:])
        values = self.block[:count] if count <= BLOCK else self.block.repeat(-(-count // BLOCK))[:count]
        return values.reshape(stop - start, *self.shape[1:]).to(self.dtype)


def make_checkpoint(folder: Path, sizes: dict[str, int]) -> None:
    """A random checkpoint `folder/model` and its adapters `folder/lora` and `folder/dora`."""
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
    model_folder = folder / "model"
    model_folder.mkdir(parents=True)
    tokenizer.save_pretrained(model_folder)
    durable.write_bytes(model_folder / "config.json", config.to_json_string().encode())
    weights = {name: Tiled(tuple(value.shape), block) for name, value in model.state_dict().items()}
    write_weights(model_folder, weights)
    if not (model_folder / INDEX).exists() and sizes is RELEASED:
        raise RuntimeError("the released size should need several files")
    shapes = {name: weights[f"{name}.weight"].shape for name in target_modules(model, TrainableOptions(), "single")}
    full = {
        f"base_model.model.{name}.weight": replace(weights[f"{name}.weight"], dtype=torch.float32) for name in IN_FULL
    }
    make_adapter(folder / "lora", shapes, {}, {})
    make_adapter(folder / "dora", shapes, full, {"use_dora": True, "modules_to_save": list(IN_FULL)})


def make_adapter(folder: Path, shapes: dict[str, Shape], full: Mapping[str, Source], options: dict[str, Any]) -> None:
    """A random adapter of rank 16.

    Args:
        shapes: of the layers with LoRA. full: weights of modules in full. options: of PEFT.
    """
    tensors: dict[str, Source] = dict(full)
    for name, (out, width) in shapes.items():
        prefix = f"base_model.model.{name}."
        tensors[prefix + "lora_A.weight"] = Held(torch.randn(16, width) * 0.02)
        tensors[prefix + "lora_B.weight"] = Held(torch.randn(out, 16) * 0.02)
        if options.get("use_dora"):
            tensors[prefix + "lora_magnitude_vector"] = Held(torch.rand(out) + 0.5)
    folder.mkdir()
    write_tensors(folder / "adapter_model.safetensors", tensors)
    told = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": exact_pattern(shapes), **options}
    (folder / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": "../model"}))


def measured(command: list[str | Path]) -> tuple[float, float]:
    """Seconds, and peak resident memory in GB, of a command."""
    started = time.monotonic()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"failed: {command}")
    return time.monotonic() - started, usage.ru_maxrss / 1e6


def exports(work: Path, kinds: list[str]) -> Iterator[tuple[str, Path, str]]:
    """Exports to measure: a name, what is exported, the layout of the result."""
    for kind, name in (("lora", "LoRA"), ("dora", "DoRA, modules in full")):
        for layout in ("original", "native"):
            if kind in kinds:
                yield f"{name} -> {layout}", work / kind, layout
    if "converted" in kinds:
        yield "original -> native", work / "model", "native"
        yield "native -> original", work / "native", "original"


def measure(work: Path, rounds: int, kinds: list[str]) -> None:
    """Measure copies and exports in turns, and print them."""
    python, result = Path(sys.executable), work / "result"
    for name, source, layout in exports(work, kinds):
        if source.name == "native":
            shutil.rmtree(work / "model")  # the disk need not hold three
        checkpoint = source if source.name in ("model", "native") else work / "model"
        export = ["-m", "higgs_tune.train.export.merge", source, "--out", result, "--layout", layout]
        seconds, ratios, memory = list[float](), list[float](), 0.0
        for number in range(rounds):
            base, _ = measured([python, "-I", "-c", COPY, checkpoint, result])
            shutil.rmtree(result)
            took, peak = measured([python, *export])
            seconds, ratios, memory = [*seconds, took], [*ratios, took / base], max(memory, peak)
            if source.name == "model" and number == rounds - 1:
                result.rename(work / "native")
            else:
                shutil.rmtree(result)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name:<34} {statistics.median(seconds):6.1f} s  {statistics.median(ratios):5.2f} x copy ({spread})  "
              f"{memory:5.2f} GB", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("released", "small"), default="released")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench_export")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    work: Path = options.work
    shutil.rmtree(work, ignore_errors=True)
    try:
        make_checkpoint(work, RELEASED if options.size == "released" else SMALL)
        size = sum(file.stat().st_size for file in (work / "model").iterdir()) / 1e9
        made = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"checkpoint of {size:.2f} GB, made with {made:.2f} GB of memory", flush=True)
        measure(work, options.rounds, options.kinds)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
