"""How fast the loader is: against plain webdataset, and against encoding on the fly, on the same data in the same run.

    python bench/loader.py [--samples 4000] [--rounds 5]

Makes a synthetic set (reference and target clips of 10 s each, 150 text tokens, with and without mel features), then
times, alternating round by round: our loader (read, verify, expand, delay pattern, packing indices) with 0, 1, 2 and 4
workers; `webdataset` through a DataLoader (decode, shuffle, pad to a batch; no delay pattern); and decoding wav files
and running a codec of the real size (random weights) in `__getitem__`. Prints medians, spread and ratios.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import tyro
import webdataset
from higgs_tune.preprocess.audio.audio import load_clip
from higgs_tune.preprocess.audio.clip import Clip
from higgs_tune.preprocess.audio.options import AudioOptions
from higgs_tune.preprocess.codec.codec import CodecConfig, HiggsCodec
from higgs_tune.shards.format import Sample
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.shards.split import ValidationSplit
from higgs_tune.shards.writer import SetWriter
from higgs_tune.train.data.loader import Loader, LoaderOptions
from higgs_tune.train.data.sampler import Schedule
from higgs_tune.train.dist.context import World
from machine import describe_machine
from torch.utils.data import DataLoader, Dataset
from transformers import DacConfig, HubertConfig

IDS = SpecialIds(audio_in=128015, audio_out=128016, stream_bos=1024, stream_eos=1025, codebooks=8)
FRAMES, TEXT, PER_SHARD, CLIP_S = 250, 150, 500, 10
Timing = tuple[int, int, float]  # samples, positions, seconds


@dataclass(frozen=True)
class Options:
    """Loader benchmark."""

    samples: int = 4000
    """Samples in the synthetic set, and samples timed a round."""
    rounds: int = 5
    """Rounds; each times everything once."""
    workers: tuple[int, ...] = (0, 1, 2, 4)
    """Numbers of loader processes to time."""
    mel: bool = True
    """Time with mel features too."""
    fly_samples: int = 2
    """Samples encoded on the fly a round; each takes seconds."""


def make_sample(number: int, *, mel: bool) -> Sample:
    """10 s of reference, 10 s of target, 150 text tokens."""
    rng = np.random.default_rng(number)
    tokens_2L = rng.integers(0, 128_000, (2, TEXT)).astype(np.int32)
    tokens_2L[1, :100] = -100
    tokens_2L[0, 30], tokens_2L[0, 120] = IDS.audio_in, IDS.audio_out
    segments: list[dict[str, Any]] = [
        {"role": role, "frames": FRAMES, "seconds": float(CLIP_S), "source": f"{number}.wav", "sha256": "0" * 64}
        for role in ("user", "assistant")
    ]
    mels: tuple[np.ndarray, ...] = ()
    if mel:
        segments[0]["mel_frames"] = 4 * FRAMES
        mels = ((0.3 * rng.standard_normal((128, 4 * FRAMES))).astype(np.float16),)
    message = {"role": "user", "content": [{"type": "text", "text": "م" * 150}]}
    meta = {"messages": [message], "start_index": None, "speaker": f"s{number % 50}", "misc": {"duration": CLIP_S}}
    codes_KT = rng.integers(0, 1024, (8, 2 * FRAMES)).astype(np.uint16)
    return Sample(f"{number:09d}", meta | {"segments": segments}, tokens_2L, codes_KT, mels)


def make_set(folder: Path, samples: int, *, mel: bool) -> ShardSet:
    features = "mel" if mel else "none"
    writer = SetWriter(folder, IDS, ValidationSplit(), features=features)
    writer.begin()
    shards = -(-samples // PER_SHARD)
    for shard in range(shards):
        numbers = range(shard * PER_SHARD, min(samples, (shard + 1) * PER_SHARD))
        writer.write(shard, (make_sample(number, mel=mel) for number in numbers), [])
    writer.finish(shards, {"model": {"special_ids": IDS.to_dict()}, "features": {"whisper": features}})
    return ShardSet(folder)


def time_loader(shards: ShardSet, workers: int, features: str, samples: int) -> Timing:
    """Packs of 16,384 positions, from the first batch on (workers are started before)."""
    place = World(0, 1, 0, 1)
    schedule = Schedule([shards], tokens_per_pack=16_384, seed=0, accumulation=1, world=place, features=features)
    loader = Loader(schedule, LoaderOptions(workers=workers, features=features))
    next(loader)
    began, count, positions = time.perf_counter(), 0, 0
    for batch in loader:
        count, positions = count + len(batch.keys), positions + batch.positions
        if count >= samples:
            break
    elapsed = time.perf_counter() - began
    loader.close()
    return count, positions, elapsed


def pad_batch(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What a plain training script does: one padded tensor a field."""
    fields = {}
    for name in ("tokens.npy", "codes.npy"):
        arrays = [torch.from_numpy(sample[name].astype(np.int64)) for sample in batch]
        width = max(array.shape[1] for array in arrays)
        fields[name] = torch.stack([torch.nn.functional.pad(array, (0, width - array.shape[1])) for array in arrays])
    return fields


def timed(batches: Iterable[Any], samples: int) -> Timing:
    """Samples from the second batch on; batches have the field `tokens.npy`."""
    iterator = iter(batches)
    next(iterator)
    began, count = time.perf_counter(), 0
    for batch in iterator:
        count += len(batch["tokens.npy"])
        if count >= samples:
            break
    return count, 0, time.perf_counter() - began


def time_webdataset(shards: ShardSet, workers: int, samples: int) -> Timing:
    urls = [str(shards.folder / shard["name"]) for shard in shards.manifest["shards"]]
    pipeline = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode().batched(25, pad_batch)  # pyright: ignore
    return timed(DataLoader(pipeline, batch_size=None, num_workers=workers), samples)


def real_size_codec() -> HiggsCodec:
    """The released codec's sizes, random weights."""
    acoustic = DacConfig(encoder_hidden_size=64, downsampling_ratios=[8, 5, 4, 2, 3], decoder_hidden_size=1024)
    acoustic.upsampling_ratios, acoustic.hidden_size = acoustic.downsampling_ratios, 256
    config = CodecConfig(24_000, 16_000, 8, 1024, 64, HubertConfig(mask_time_prob=0.0), acoustic)
    return HiggsCodec(config).eval()


class OnTheFly(Dataset[np.ndarray]):
    """Wav files in, codes out, in `__getitem__`."""

    def __init__(self, folder: Path, codec: HiggsCodec) -> None:
        self.folder, self.codec = folder, codec

    def __getitem__(self, number: int) -> np.ndarray:
        clips = [Clip("", str(self.folder / f"{(2 * number + i) % 8}.wav")) for i in range(2)]
        waves = [load_clip(clip, 24_000, AudioOptions(0, 60)).samples_S for clip in clips]
        return np.concatenate([self.codec.encode(wave_S) for wave_S in waves], axis=1)


def make_wavs(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(8):
        soundfile.write(folder / f"{number}.wav", 0.1 * rng.standard_normal(24_000 * CLIP_S), 24_000)


def time_on_the_fly(data: OnTheFly, samples: int) -> Timing:
    began = time.perf_counter()
    for number in range(samples):
        data[number]
    return samples, 0, time.perf_counter() - began


def contenders(options: Options, folder: Path) -> Iterator[tuple[str, Callable[[], Timing]]]:
    """Everything that is timed, by name."""
    for mel in (False, True) if options.mel else (False,):
        count = options.samples if not mel else max(200, options.samples // 10)  # mel features are 50 times the bytes
        shards = make_set(folder / f"set-{mel}", count, mel=mel)
        for workers in options.workers:
            name = f"ours{', mel' if mel else ''}, {workers} workers"
            yield name, partial(time_loader, shards, workers, "mel" if mel else "none", count)
            if not mel:
                yield f"webdataset, {workers} workers", partial(time_webdataset, shards, workers, count // 2)
    make_wavs(folder)
    yield "on the fly", partial(time_on_the_fly, OnTheFly(folder, real_size_codec()), options.fly_samples)


def main() -> None:
    options = tyro.cli(Options)
    with tempfile.TemporaryDirectory() as folder:
        things = list(contenders(options, Path(folder)))
        rates: dict[str, list[float]] = {name: [] for name, _ in things}
        tokens: dict[str, list[float]] = {name: [] for name, _ in things}
        for _ in range(options.rounds):
            for name, run in things:
                samples, positions, seconds = run()
                rates[name].append(samples / seconds)
                tokens[name].append(positions / seconds)
    print(describe_machine())
    print(f"{'':<24}{'samples/s':>12}{'spread':>24}{'positions/s':>14}")
    for name, found in rates.items():
        spread = f"{min(found):,.1f} to {max(found):,.1f}"
        print(f"{name:<24}{statistics.median(found):>12,.1f}{spread:>24}{statistics.median(tokens[name]):>14,.0f}")
    ratios = {}
    for workers in options.workers:
        pairs = zip(rates[f"ours, {workers} workers"], rates[f"webdataset, {workers} workers"], strict=True)
        ratios[f"ours / webdataset, {workers} workers"] = [ours / theirs for ours, theirs in pairs]
    best = max((f"ours, {workers} workers" for workers in options.workers), key=lambda n: statistics.median(rates[n]))
    ratios[f"{best} / on the fly"] = [a / b for a, b in zip(rates[best], rates["on the fly"], strict=True)]
    for name, found in ratios.items():
        print(f"{name:<40}{statistics.median(found):>10,.1f}x  ({min(found):,.1f} to {max(found):,.1f})")
    print(json.dumps({"rates": rates, "ratios": dict(itertools.islice(ratios.items(), 99))}))


if __name__ == "__main__":
    main()
