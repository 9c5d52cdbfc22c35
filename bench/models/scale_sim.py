"""Scale beyond one machine: 1 to 1,024 ranks from the real plan, and what 800 h, 100 kh and 10 Mh of audio take.

    cd bench && python -m models.scale_sim [--samples 200000] [--tokens_per_second 37200] [--out scale.json]

Simulated, not measured, but for the plan's own time. Each rank's step takes its packs' model FLOPs at a rate that
makes a mean pack run at `tokens_per_second`, and a random delay (half-normal); the step ends with the slowest rank and
with what of the all-reduce does not hide behind backward. Every assumption is an option, and is printed.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from higgs_tune.shards.index import index_dtype
from higgs_tune.shards.plan import Plan, PlanInput, plan_epoch
from higgs_tune.train.model.load import HiggsAudioModel
from models.synthetic import SIZES, config_of, with_lora
from plan import lengths_of

HOURS = {"800 h": 800, "100 kh": 100_000, "10 Mh": 10_000_000}


@dataclass(frozen=True)
class Options:
    """Scale simulation."""

    ranks: tuple[int, ...] = (1, 8, 64, 256, 1024)
    """Numbers of GPUs."""
    samples: int = 200_000
    """Samples of the simulated epoch, of the lengths of bench/plan.py."""
    tokens_per_pack: int = 16_384
    """Positions of a pack."""
    accumulation: int = 1
    """Packs of a rank for each optimizer step."""
    tokens_per_second: float = 37_200
    """Useful tokens/s of one GPU without waiting, as measured on an H200 (bench/h200.json)."""
    jitter: float = 0.003
    """Standard deviation of a rank's random delay, as a share of its step."""
    gpus_per_node: int = 8
    """GPUs that NVLink joins."""
    nvlink_gb_s: float = 450.0
    """Bandwidth of a GPU to others of its node, one way."""
    network_gb_s: float = 50.0
    """Bandwidth of a GPU to other nodes (400 Gbit/s each)."""
    latency_us: float = 20.0
    """Latency of each of the log2(ranks) stages of an all-reduce."""
    overlap: float = 0.6
    """Share of the last micro-step that the all-reduce hides behind, but for its last bucket of 25 MB."""
    lora_rank: int = 16
    """Rank of LoRA; its float32 gradients are what is sent."""
    loader_samples_per_s: float = 1411.0
    """Samples/s of one loader process: a quarter of what four made on two cores (bench/loader.py)."""
    peer_ratio: float = 1.9
    """Our rate over that of the packed peer, which pads nothing, as measured on an H200 (bench/h200.json)."""
    workers: int = 4
    """Loader processes a GPU."""
    storage_gb_s: float = 10.0
    """Bandwidth of the storage that all ranks read shards from."""
    bytes_per_sample: float = 9_000.0
    """Bytes read for a sample without Whisper features: 16 a frame, 8 a text token, tar headers."""
    seconds_per_sample: float = 6.2
    """Mean length of a target clip; each clip is a target once."""
    samples_per_shard: int = 4096
    """Samples of a shard."""
    encode_hours: float = 325.0
    """Hours of audio that one GPU encodes in an hour, the lower of two runs on an H200 (bench/h200.json)."""
    out: Path | None = None
    """JSON file of the results."""


def gradient_bytes(rank: int) -> int:
    """Bytes that an all-reduce of LoRA's gradients carries, at the released sizes."""
    with torch.device("meta"):
        peft_model = with_lora(HiggsAudioModel(config_of(SIZES["3b"])).requires_grad_(False), rank)
    return 4 * sum(parameter.numel() for parameter in peft_model.parameters() if parameter.requires_grad)


def all_reduce_s(options: Options, ranks: int, size: float) -> float:
    """A ring within nodes and one across them, each carrying 2 (n - 1) / n of the bytes; and latency."""
    inside, nodes = min(ranks, options.gpus_per_node), -(-ranks // options.gpus_per_node)
    time_s = 2 * (inside - 1) / inside * size / (options.nvlink_gb_s * 1e9)
    time_s += 2 * (nodes - 1) / nodes * size / inside / (options.network_gb_s * 1e9)
    return time_s + options.latency_us * 1e-6 * math.ceil(math.log2(max(1, ranks)))


def pack_seconds(options: Options, plan: Plan, lengths: np.ndarray) -> np.ndarray:
    """Compute time of each pack, from positions and squared sample lengths (attention's share)."""
    in_order = lengths[plan.rows].astype(np.float64)
    positions = np.add.reduceat(in_order, plan.bounds[:-1])
    squares = np.add.reduceat(in_order**2, plan.bounds[:-1])
    size = SIZES["3b"]
    linear = (
        4 * size.layers * (size.hidden * size.head_dim * 2 * (size.heads + size.kv_heads) + 3 * size.hidden * size.ffn)
    )
    work = positions * linear + 6 * size.layers * size.heads * size.head_dim * squares
    return work / work.sum() * positions.sum() / options.tokens_per_second


def simulate(options: Options, ranks: int, times: np.ndarray, mean_length: float, gradients: int) -> dict[str, Any]:
    """One epoch on some ranks; missing packs of the tail take a mean pack's time and bring nothing."""
    rng = np.random.default_rng(0)
    a_step = ranks * options.accumulation
    steps = -(-len(times) // a_step)
    padded = np.concatenate([times, np.full(steps * a_step - len(times), times.mean())])
    per_rank = padded.reshape(steps, options.accumulation, ranks).sum(1)
    noisy = per_rank * (1 + np.abs(rng.normal(0, options.jitter, per_rank.shape)))
    exchange = all_reduce_s(options, ranks, gradients) if ranks > 1 else 0.0
    last_bucket = all_reduce_s(options, ranks, 25e6) if ranks > 1 else 0.0
    hidden = options.overlap * times.mean()
    step_s = noisy.max(1) + np.maximum(exchange - hidden, min(exchange, last_bucket))
    needs = options.tokens_per_second / mean_length
    storage = options.storage_gb_s * 1e9 / options.bytes_per_sample
    return {
        "ranks": ranks, "steps": steps, "step_p50_s": float(np.median(step_s)),
        "step_p99_s": float(np.percentile(step_s, 99)),
        "plan_imbalance": float((per_rank.max(1) / per_rank.mean(1)).mean() - 1),
        "imbalance": float((noisy.max(1) / noisy.mean(1)).mean() - 1), "tail_loss": 1 - len(times) / (steps * a_step),
        "all_reduce_s": exchange, "efficiency": float(times.sum() / ranks / step_s.sum()),
        "efficiency_without_tail": float(times.sum() / ranks / step_s.sum() * steps * a_step / len(times)),
        "samples_per_s": needs * ranks, "loader_share": needs / (options.workers * options.loader_samples_per_s),
        "storage_share": needs * ranks / storage,
    }  # fmt: skip


def data_table(options: Options, plan_s: float, plan_bytes: float) -> list[dict[str, Any]]:
    """What amounts of audio take; plan time and memory in proportion to the samples of the plan that was timed."""
    rows, mean_length = [], float(lengths_of(10_000).mean())
    for name, hours in HOURS.items():
        samples = hours * 3600 / options.seconds_per_sample
        scale = samples / options.samples
        encode = hours / options.encode_hours
        rows.append({
            "audio": name, "samples": samples, "shards": math.ceil(samples / options.samples_per_shard),
            "set_gb": samples * options.bytes_per_sample / 1e9, "index_gb": samples * index_dtype(9).itemsize / 1e9,
            "plan_s": plan_s * scale, "plan_gb": plan_bytes * scale / 1e9, "encode_gpu_hours": encode,
            "epoch_gpu_hours": (epoch := samples * mean_length / options.tokens_per_second / 3600),
            "peer_epoch_gpu_hours": epoch * options.peer_ratio,
        })  # fmt: skip
    return rows


def main() -> None:
    options = tyro.cli(Options)
    print("assumed:", json.dumps({k: v for k, v in asdict(options).items() if k != "out"}, default=str))
    lengths = lengths_of(options.samples)
    began = time.perf_counter()
    given = [PlanInput(np.arange(options.samples), lengths, "scale")]
    plan = plan_epoch(given, tokens_per_pack=options.tokens_per_pack, seed=0, epoch=0, weighted=False)
    plan_s = time.perf_counter() - began
    times, gradients = pack_seconds(options, plan, lengths), gradient_bytes(options.lora_rank)
    fill = lengths.sum() / len(plan) / options.tokens_per_pack
    print(f"{len(plan):,} packs, {fill:.2%} full, planned in {plan_s:.2f} s; "
          f"gradients {gradients / 1e6:.0f} MB")  # fmt: skip
    found = [simulate(options, ranks, times, float(lengths.mean()), gradients) for ranks in options.ranks]
    print(f"{'ranks':>6}{'steps':>8}{'p50 s':>8}{'p99 s':>8}{'plan':>8}{'imbalance':>11}{'tail':>8}"
          f"{'all-reduce':>12}{'efficiency':>12}{'no tail':>9}{'loader':>8}{'storage':>9}")  # fmt: skip
    for row in found:
        print(f"{row['ranks']:>6,}{row['steps']:>8,}{row['step_p50_s']:>8.3f}{row['step_p99_s']:>8.3f}"
              f"{row['plan_imbalance']:>8.2%}{row['imbalance']:>11.2%}{row['tail_loss']:>8.2%}"
              f"{row['all_reduce_s'] * 1e3:>9.1f} ms{row['efficiency']:>12.2%}{row['efficiency_without_tail']:>9.2%}"
              f"{row['loader_share']:>8.1%}{row['storage_share']:>9.2%}")  # fmt: skip
    loader_full = options.tokens_per_second / float(lengths.mean()) / options.workers
    storage_full = options.storage_gb_s * 1e9 / options.bytes_per_sample / options.tokens_per_second * lengths.mean()
    print(f"data wait would begin below {loader_full:.0f} samples/s a loader process, "
          f"or from {storage_full:,.0f} ranks on with this storage")  # fmt: skip
    data = data_table(options, plan_s, 5 * lengths.nbytes)
    print(f"{'audio':<8}{'samples':>15}{'shards':>11}{'set GB':>10}{'index GB':>10}{'plan s':>9}{'plan GB':>9}"
          f"{'encode GPU h':>14}{'epoch GPU h':>13}{'peer':>11}")  # fmt: skip
    for row in data:
        print(f"{row['audio']:<8}{row['samples']:>15,.0f}{row['shards']:>11,}{row['set_gb']:>10,.1f}"
              f"{row['index_gb']:>10,.2f}{row['plan_s']:>9,.1f}{row['plan_gb']:>9,.2f}{row['encode_gpu_hours']:>14,.1f}"
              f"{row['epoch_gpu_hours']:>13,.1f}{row['peer_epoch_gpu_hours']:>11,.1f}")  # fmt: skip
    if options.out:
        result = {"plan_s": plan_s, "gradient_bytes": gradients, "ranks": found, "audio": data}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
