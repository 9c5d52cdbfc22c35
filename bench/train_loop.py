"""The whole trainer at work: tokens/s, step time, MFU and the share of time that steps wait for data.

    python bench/train_loop.py --size small [--steps 40] [--tokens_per_pack 4096 8192] [--kernels eager]

Writes a checkpoint of the size (random weights) and a set of synthetic samples of the stated lengths to a temporary
folder, then runs the training command on every GPU, or on one process without: loader processes, optimizer, all-reduce,
metrics and one checkpoint included; once for each size of pack. Numbers are the trainer's own, from metrics.jsonl: of
intervals of LOGGING steps, medians of those after the profiled steps. The profile's table says where a step goes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from higgs_tune.preprocess.checkpoints.checkpoint import describe_checkpoint, read_config, special_ids
from higgs_tune.shards.format import Sample
from higgs_tune.shards.split import ValidationSplit
from higgs_tune.shards.writer import SetWriter
from higgs_tune.train.toy import SPECIALS, byte_level, with_specials
from machine import describe_machine
from models.synthetic import FRAMES_A_SECOND, SIZES, VOCABULARY, SizeName, config_of, make_model, synthetic_sample
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LOGGING = 3  # steps of an interval
PROFILED = 6  # steps that the profiler waits for, warms up with or records
STREAM_TOKENS = {"audio_out_bos_token_id": "<|audio_out_bos|>", "audio_eos_token_id": "<|audio_eos|>"}
NAMES = ("tokens_per_second", "step_time_s", "data_wait_fraction", "mfu", "max_memory_gb")


@dataclass(frozen=True)
class Options:
    """Trainer benchmark."""

    size: SizeName = "small"
    """Size of the model."""
    steps: int = 40
    """Optimizer steps, the profiled ones included."""
    tokens_per_pack: tuple[int, ...] = (16_384,)
    """Positions of a pack; each size is a run."""
    samples: int = 2000
    """Samples of the set."""
    kernels: Literal["auto", "eager", "compiled", "triton"] = "auto"
    """As the trainer's --kernels."""
    out: Path | None = None
    """JSON file of the results."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """As many tokens as the released one, its special tokens at their places; the others are never read as text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = alphabet + [f"token {number}" for number in range(VOCABULARY - len(SPECIALS) - len(alphabet))]
    return with_specials(byte_level(models.BPE({token: number for number, token in enumerate(plain)}, [])))


def write_model(folder: Path, size: SizeName, device: torch.device) -> None:
    tokenizer = make_tokenizer()
    fields = {name: tokenizer.convert_tokens_to_ids(token) for name, token in STREAM_TOKENS.items()}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = config_of(SIZES[size])
    config.update({**fields, "torch_dtype": dtype, "pad_token_id": tokenizer.pad_token_id})
    make_model(config, device, dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def samples(count: int) -> Iterator[Sample]:
    """Synthetic samples as preprocessing would write them."""
    for number in range(count):
        made = synthetic_sample(number)
        segments = [
            {"role": role, "frames": frames, "seconds": frames / FRAMES_A_SECOND, "source": f"{number}.wav"}
            for role, frames in zip(("user", "assistant"), made.segment_frames, strict=True)
        ]
        meta = {"messages": [], "start_index": None, "speaker": None, "misc": {}}
        meta["segments"] = [segment | {"sha256": "0" * 64} for segment in segments]
        yield Sample(made.key, meta, made.tokens_2L, made.codes_KT, ())


def write_set(folder: Path, model: Path, count: int) -> None:
    writer = SetWriter(folder, special_ids(read_config(model), model), ValidationSplit(0.0), features="none")
    writer.begin()
    writer.write(0, samples(count), [])
    writer.finish(1, {"model": describe_checkpoint(model), "features": {"whisper": "none"}})


def train(folder: Path, options: Options, tokens_per_pack: int, ranks: int) -> list[dict[str, Any]]:
    """Run the training command; its metrics, a line an interval."""
    out = folder / f"out-{tokens_per_pack}"
    flags = {"training_stage": "single", "model_path": folder / "model", "train_data_dir": folder / "set",
             "output_dir": out, "max_steps": options.steps, "tokens_per_pack": tokens_per_pack,
             "logging_steps": LOGGING, "save_steps": options.steps // 2, "eval_steps": 0}  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += ["-m", "higgs_tune.train", "--profile", "--kernels", options.kernels]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)  # noqa: PLW1510
    if done.returncode:
        sys.exit(f"the trainer failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train" and line["step"] > PROFILED + LOGGING]


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """A result for each size of pack."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = max(1, torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", options.size, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write_set(folder / "set", folder / "model", options.samples)
        for tokens_per_pack in options.tokens_per_pack:
            lines = train(folder, options, tokens_per_pack, ranks)
            table = (folder / f"out-{tokens_per_pack}" / "profile" / "table.txt").read_text().partition("\n---")[0]
            found = {name: [line[name] for line in lines if name in line] for name in NAMES}
            yield {
                "size": options.size, "ranks": ranks, "tokens_per_pack": tokens_per_pack, "kernels": options.kernels,
                "intervals": len(lines), "steps_of_an_interval": LOGGING, "profile": table.splitlines(),
                **{name: {"median": statistics.median(values), "least": min(values), "most": max(values)}
                   for name, values in found.items() if values},
            }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    packs, intervals = f"packs of {result['tokens_per_pack']:,}", f"{result['intervals']} intervals of {LOGGING} steps"
    print(f"{result['size']}, {result['ranks']} processes, {packs}, {intervals}, kernels {result['kernels']}")
    print(f"{'':<20}{'median':>12}{'least':>12}{'most':>12}")
    for name in NAMES:
        if name in result:
            print(f"{name:<20}" + "".join(f"{result[name][at]:>12,.4g}" for at in ("median", "least", "most")))
    print("\n".join(result["profile"]))


def main() -> None:
    options, runs = tyro.cli(Options), list[dict[str, Any]]()
    print(describe_machine())
    for result in measure(options):
        show(result)
        runs.append(result)
        if options.out:  # after each run, so that a time limit loses the last one only
            options.out.write_text(json.dumps({"machine": describe_machine(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
