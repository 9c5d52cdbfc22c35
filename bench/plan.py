"""How long planning an epoch takes, and how soon the first batch is there, from 10 thousand to 10 million samples.

    python bench/plan.py [--samples 10000 100000 1000000 10000000]

Lengths: two clips of log-normal length (median 5.5 s, sigma 0.5) and 80 to 250 text tokens. Each size runs in a
process of its own, so that the peak memory is its own. The first batch is timed from opening the set on: index check,
plan, first pack; the set's index has the full number of rows over few real samples.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
import xxhash
from higgs_tune.shards.index import npy_bytes
from higgs_tune.shards.plan import PlanInput, plan_epoch
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.data.loader import Loader, LoaderOptions
from higgs_tune.train.data.sampler import Cursor, Schedule
from higgs_tune.train.dist.context import World
from machine import describe_machine

BUDGET = 8192


@dataclass(frozen=True)
class Options:
    """Plan benchmark."""

    samples: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
    """Sizes to plan."""
    one: int | None = None
    """Time this size in this process and print JSON."""


def lengths_of(samples: int) -> np.ndarray:
    """Positions of each sample."""
    rng = np.random.default_rng(0)
    seconds = rng.lognormal(1.7, 0.5, (samples, 2)).clip(1, 20).sum(1)
    return (seconds * 25).astype(np.int64) + rng.integers(80, 250, samples) + 16


def big_set(folder: Path, samples: int) -> None:
    """A set of 100 samples whose index repeats them up to `samples` rows."""
    from loader import make_set

    small = make_set(folder, 100, mel=False)
    index = np.resize(np.array(small.index), samples)
    manifest = small.manifest
    (folder / "index.npy").write_bytes(npy_bytes(index))
    size = (folder / "index.npy").stat().st_size
    manifest["index"] |= {"rows": samples, "bytes": size, "xxh3": xxhash.xxh3_64_hexdigest(index.view(np.uint8).data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def measure(samples: int) -> dict[str, float]:
    lengths = lengths_of(samples)
    given = [PlanInput(np.arange(samples), lengths, "bench")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    plan = plan_epoch(given, tokens_per_pack=BUDGET, seed=0, epoch=0, weighted=False)
    plan_s = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        big_set(Path(folder), samples)
        began = time.perf_counter()
        shards = ShardSet(folder)
        schedule = Schedule([shards], tokens_per_pack=BUDGET, seed=0, accumulation=1, world=World(0, 1, 0, 1))
        next(Loader(schedule, LoaderOptions(workers=0), Cursor(3, 1000)))  # as a resumed run does
        first_s = time.perf_counter() - began
    fill = float(lengths.sum()) / len(plan) / BUDGET
    return {"samples": samples, "packs": len(plan), "fill": fill, "plan_s": plan_s, "peak_gb": peak / 1e6,
            "more_gb": (peak - before) / 1e6, "first_batch_s": first_s}  # fmt: skip


def main() -> None:
    options = tyro.cli(Options)
    if options.one is not None:
        print(json.dumps(measure(options.one)))
        return
    print(describe_machine())
    print(f"{'samples':>12}{'packs':>10}{'fill':>8}{'plan s':>8}{'peak GB':>9}{'first batch s':>15}")
    for samples in options.samples:
        command = [sys.executable, __file__, "--one", str(samples)]
        out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"{samples:>12,}{out['packs']:>10,}{out['fill']:>8.2%}{out['plan_s']:>8.2f}{out['peak_gb']:>9.2f}"
            f"{out['first_batch_s']:>15.2f}"
        )


if __name__ == "__main__":
    main()
