"""Our loader against loaders that install from PyPI: MosaicML Streaming, Megatron Energon, and SPDL's threads.

    pip install --no-deps mosaicml-streaming megatron-energon spdl-core     (and what they import, but no torchvision)
    python bench/loader_peers.py [--samples 4000] [--rounds 5]

The same samples (those of bench/loader.py): ours and SPDL read our shards, Energon reads them as the webdataset that
they are, Streaming reads MDS files made from them. Ours verifies, expands and packs; SPDL's threads call our reader,
which verifies, and pad batches of 25; the others decode arrays, shuffle within a buffer and pad batches of 25. A
package that is not installed is left out, and named. Prints medians, spread, and ratios within each round.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import tyro
from higgs_tune.shards.format import Arrays
from higgs_tune.shards.reader import ShardSet
from loader import Timing, make_set, pad_batch, time_loader, timed
from machine import describe_machine
from torch.utils.data import DataLoader

BATCH, SHUFFLED = 25, 1000


@dataclass(frozen=True)
class Options:
    """Loader benchmark against streaming loaders."""

    samples: int = 4000
    """Samples in the synthetic set, and samples timed a round."""
    rounds: int = 5
    """Rounds; each times everything once."""
    workers: tuple[int, ...] = (0, 1, 2, 4)
    """Numbers of loader processes, or of threads, to time."""
    out: Path | None = None
    """JSON file of the results."""


def import_streaming() -> Any:
    """MosaicML Streaming without its vision data sets, which import torchvision."""
    sys.modules.setdefault("streaming.vision", ModuleType("streaming.vision"))
    import streaming  # pyright: ignore[reportMissingImports]

    return streaming


def make_mds(shards: ShardSet, folder: Path) -> Path:
    """The samples as MDS files, their arrays typed."""
    columns = {"tokens.npy": "ndarray:int32", "codes.npy": "ndarray:uint16"}
    with import_streaming().MDSWriter(out=str(folder), columns=columns) as writer:
        for sample in shards.read_arrays(range(len(shards))):
            assert isinstance(sample, Arrays)
            writer.write({"tokens.npy": sample.tokens_2L, "codes.npy": sample.codes_KT})
    return folder


def time_mds(folder: Path, workers: int, samples: int) -> Timing:
    streaming = import_streaming()
    streaming.base.util.clean_stale_shared_memory()
    data = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    return timed(DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=pad_batch), samples)


def make_energon(shards: ShardSet) -> Path:
    """Energon's own index beside a copy of the shards."""
    from megatron.energon.flavors.webdataset.prepare import (  # pyright: ignore[reportMissingImports]
        WebdatasetPreparator,
    )

    names = [shard["name"] for shard in shards.manifest["shards"]]
    ratio = [("train", 1.0), ("val", 0.0), ("test", 0.0)]
    WebdatasetPreparator.prepare_dataset(shards.folder, names, split_parts_ratio=ratio, workers=1)
    kind = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    (shards.folder / ".nv-meta" / "dataset.yaml").write_text(json.dumps(kind))
    return shards.folder


def energon_encoder() -> Any:
    """A task encoder that takes every field and pads batches."""
    from megatron.energon import (  # pyright: ignore[reportMissingImports]
        Cooker,
        DefaultTaskEncoder,
        basic_sample_keys,
        stateless,
    )

    @stateless
    def cook(sample: dict[str, Any]) -> dict[str, Any]:
        return {**basic_sample_keys(sample), "tokens.npy": sample["tokens.npy"], "codes.npy": sample["codes.npy"]}

    class Encoder(DefaultTaskEncoder):
        cookers = (Cooker(cook),)

        @stateless
        def batch(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return pad_batch(
                [{name: np.asarray(sample[name]) for name in ("tokens.npy", "codes.npy")} for sample in samples]
            )

    return Encoder()


def time_energon(folder: Path, workers: int, samples: int) -> Timing:
    from megatron.energon import (  # pyright: ignore[reportMissingImports]
        WorkerConfig,
        get_loader,
        get_train_dataset,
    )

    place = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    data = get_train_dataset(
        folder, worker_config=place, batch_size=BATCH, shuffle_buffer_size=SHUFFLED, max_samples_per_sequence=100,
        task_encoder=energon_encoder(),
    )  # fmt: skip
    return timed(get_loader(data, worker_config=place), samples)


def time_spdl(shards: ShardSet, threads: int, samples: int) -> Timing:
    """A thread pool reads batches of random rows by our reader and pads them."""
    from spdl.pipeline import PipelineBuilder  # pyright: ignore[reportMissingImports]

    def rows() -> Iterator[list[int]]:
        order = np.random.default_rng(0).permutation(len(shards)).tolist()
        yield from (order[at : at + BATCH] for at in range(0, len(order), BATCH))

    def read(numbers: list[int]) -> dict[str, torch.Tensor]:
        found = [sample for sample in shards.read_arrays(numbers) if isinstance(sample, Arrays)]
        return pad_batch([{"tokens.npy": sample.tokens_2L, "codes.npy": sample.codes_KT} for sample in found])

    builder = PipelineBuilder().add_source(rows()).pipe(read, concurrency=threads).add_sink(8)
    with (pipeline := builder.build(num_threads=threads)).auto_stop():
        return timed(pipeline, samples - 2 * BATCH)


def contenders(options: Options, folder: Path) -> Iterator[tuple[str, Callable[[], Timing]]]:
    """Everything that is timed, by name."""
    shards, count = make_set(folder / "set", options.samples, mel=False), options.samples
    has = {name: find_spec(name) is not None for name in ("streaming", "megatron", "spdl")}
    if missing := [name for name, found in has.items() if not found]:
        print(f"not installed, left out: {', '.join(missing)}")
    mds = make_mds(shards, folder / "mds") if has["streaming"] else folder
    energon = make_energon(make_set(folder / "energon", count, mel=False)) if has["megatron"] else folder
    for workers in options.workers:
        yield f"ours, {workers} workers", partial(time_loader, shards, workers, "none", count)
        if has["streaming"]:
            yield f"Streaming, {workers} workers", partial(time_mds, mds, workers, count - 2 * BATCH)
        if has["megatron"]:
            yield f"Energon, {workers} workers", partial(time_energon, energon, workers, count)
        if has["spdl"] and workers:
            yield f"SPDL, {workers} threads", partial(time_spdl, shards, workers, count)


def main() -> None:
    options = tyro.cli(Options)
    with tempfile.TemporaryDirectory() as folder:
        things = list(contenders(options, Path(folder)))
        rates: dict[str, list[float]] = {name: [] for name, _ in things}
        for _ in range(options.rounds):
            for name, run in things:
                samples, _, seconds = run()
                rates[name].append(samples / seconds)
    print(describe_machine())
    print(f"{'':<24}{'samples/s':>12}{'spread':>24}{'ours to it':>12}{'spread':>18}")
    for name, found in rates.items():
        ours = rates[f"ours, {name.split()[-2]} workers"]
        ratios = [a / b for a, b in zip(ours, found, strict=True)]
        spread, of_ratio = f"{min(found):,.0f} to {max(found):,.0f}", f"{min(ratios):.1f} to {max(ratios):.1f}"
        print(
            f"{name:<24}{statistics.median(found):>12,.0f}{spread:>24}{statistics.median(ratios):>11.1f}x{of_ratio:>18}"
        )
    if options.out:
        options.out.write_text(json.dumps({"machine": describe_machine(), "rates": rates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
